"""The packed format: a table of a sample's distinct voxels and each voxel's row of it, compressed.

In: a `Sample`, or the bytes of a packed one. Out: those bytes, in shards that are tar files; or the counts,
gathered on the CPU (C or NumPy) or on a GPU. docs/packed.md has the layout byte by byte.
"""
