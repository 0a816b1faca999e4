"""Ranks of one job: who they are, how they connect, and how a failed one ends the run.

In: the environment variables of a launcher (mpirun, torchrun, srun). Out: a `World` with collectives, a
failure detector that names the rank that is gone, and exit statuses that all ranks share.
"""
