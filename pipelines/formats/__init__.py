"""The file formats of samples: NumPy pairs, TFRecords (plain and gzip), and packed samples in shards.

In: a `Sample` to write, or the bytes of a file. Out: those files, or the sample with its checksums compared.
`registry.FORMATS` has them all by name.
"""
