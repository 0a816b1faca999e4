"""Files by their address: on a file system, or objects of a store in a cloud or on a web server.

In: a path or a URL, names of files, extents. Out: their bytes, read, retried and cached; or written files.
"""
