"""Recognition, by its first bytes, of what a file holds in place of samples."""

from __future__ import annotations

import contextlib
import re
import zlib

from pipelines.errors import DataError
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

SIGNATURE_BYTES = 512
"""First bytes of a file that `recognize` needs."""

_SIGNATURES = (
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"\xfd7zXZ\0", "xz data"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 frame"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "an .npy file"),
)
_TEXTS = (
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<?xml", "an XML document"),
    (b"<", "an HTML page"),
    (b"{", "a JSON document"),
)
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")


def recognize(start: bytes) -> str | None:
    """Return a phrase such as "an HTML page" for a file that begins with `start`; None for anything else."""
    for offset, signature, phrase in _SIGNATURES:
        if start.startswith(signature, offset):
            return phrase
    if start and not start.strip(b"\0"):
        return "zeros, as after an interrupted copy"
    if _is_zlib(start):
        return "zlib data (TensorFlow's compression type ZLIB)"
    text = start.removeprefix(b"\xef\xbb\xbf").strip()
    if not text or _CONTROL.search(text):
        return None
    for signature, phrase in _TEXTS:
        if text.startswith(signature):
            return phrase
    return "text" if text.isascii() else None


def recognize_file(path: Location) -> str | None:
    """Return `recognize` of the file at `path`; None if it is not a file or cannot be read."""
    with contextlib.suppress(DataError):
        return recognize(storage_of(path).read_range(path, 0, SIGNATURE_BYTES))
    return None


def _is_zlib(start: bytes) -> bool:
    """Return whether `start` begins a zlib stream: a header with valid check bits, and valid blocks."""
    if len(start) < 2 or start[0] & 0x8F != 8 or int.from_bytes(start[:2], "big") % 31:
        return False
    with contextlib.suppress(zlib.error):
        zlib.decompressobj().decompress(start)
        return True
    return False
