"""Staging: copies of a data set on the nodes' own disks, each file read once from the shared file system.

In: the folders of a data set and a `StageConfig`. Out: the same samples, or a partition of them, on each
    node.
"""
