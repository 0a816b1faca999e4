"""Loaders of other projects beside ours: one module for each family, all rows in `registry`.

Samples go in, in the files of each row; batches of one float32 volume log(count + 1) and its target come out.
"""
