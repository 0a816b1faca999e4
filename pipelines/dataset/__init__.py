"""A folder of samples: its manifest, its list files, and the samples in order.

In: a folder in any of the formats. Out: the samples by index, each with the files it is read from and the
checksums that its manifest holds.
"""
