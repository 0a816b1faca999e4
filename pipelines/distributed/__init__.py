"""Ranks of one job: rank arithmetic, rendezvous, collectives, failure detection and exit statuses.

In: the environment variables of a launcher (mpirun, torchrun, srun). Out: a `World` (this process's rank), a
`Session` (process group with collectives), and one message that names a rank if it fails.
"""
