"""Loaders that read from an object store.

In: the files of each loader in a bucket, behind a proxy that delays answers. Out: batches, and how many
requests and bytes they took.
"""
