"""One sample as a TFRecord of one tf.train.Example, plain or in a gzip stream.

The container, little-endian: u64 length, u32 masked CRC-32C of the length, the record, u32 masked
CRC-32C of the record (tensorflow/core/lib/io/record_writer.h). See `tf_example` for the record.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import crc32c
from zlib_ng import zlib_ng

from pipelines.errors import DataError
from pipelines.formats.base import Format
from pipelines.formats.signatures import SIGNATURE_BYTES, recognize
from pipelines.formats.tf_example import REMEDY, Pieces, encode_example, parse_example
from pipelines.io import WrittenFile
from pipelines.sample import REDSHIFTS, Sample, SampleSpec, check_counts, check_target
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

try:
    import deflate
except ImportError:
    deflate = None  # zlib-ng inflates everything then.

TFRECORD_SUFFIX, INDEX_SUFFIX = ".tfrecord", ".idx"
GZIP_MAGIC = b"\x1f\x8b"

_GZIP_WBITS = 16 + 15
"""Selects one gzip member, its header and CRC-32 written or checked, in zlib's interface."""

_LEVEL = 4
_MAX_SIZE = 512
"""Voxels along the edge of a sample of unknown shape, at most: 1 GB."""

_MAX_OVERHEAD_BYTES = 1 << 20
"""Bytes of a record beside its counts, at most."""

_HEADER, _FOOTER = 12, 4
_CHUNK = 1 << 15


class TFRecord(Format):
    """The format with (`compressed`) or without gzip around it."""

    suffix = TFRECORD_SUFFIX
    suffixes = keys = (TFRECORD_SUFFIX,)

    def __init__(self, *, compressed: bool) -> None:
        self.name, self.compressed = "tfrecord_gzip" if compressed else "tfrecord", compressed
        # A plain record has an index.
        self.extra_suffixes = () if compressed else (TFRECORD_SUFFIX + INDEX_SUFFIX,)

    def write(self, directory: Location, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write `<sample_id>.tfrecord`, after the index of a plain one.

        The index, `<sample_id>.tfrecord.idx`, has the offset and the length in bytes, container
        included, of each record on a line, as DALI's tfrecord2idx writes it.

        Raises:
            DataError: `sample` has another number of channels than the format.
        """
        path, channels = directory / f"{sample_id}{self.suffix}", sample.counts.shape[-1]
        if channels != len(REDSHIFTS):
            fault = f"cannot hold {channels} channels: a TFRecord has {len(REDSHIFTS)}"
            raise DataError(path, fault, "use npy or packed")
        storage, content = storage_of(path), frame(encode_example(sample))
        if self.compressed:
            # 4% larger than with zlib's default level, in a seventh of its time. Not isa-l, which is faster
            # still: its output differs between runs in a few hundred processes (isa-l issue 140).
            stream = zlib_ng.compressobj(_LEVEL, wbits=_GZIP_WBITS)
            return (storage.write(path, *map(stream.compress, content), stream.flush()),)
        length = sum(map(len, content))
        index = storage.write(path.with_name(path.name + INDEX_SUFFIX), f"0 {length}\n".encode())
        return index, storage.write(path, *content)

    def parse(
        self,
        path: Location,
        contents: Mapping[str, bytes],
        spec: SampleSpec | None = None,
        *,
        labeled: bool = True,
    ) -> Sample:
        """See `Format.parse`; both CRCs are checked."""
        content: bytes | bytearray = contents[TFRECORD_SUFFIX]
        if self.compressed:
            content = _inflate(str(path), contents[TFRECORD_SUFFIX], spec or SampleSpec(_MAX_SIZE))
        elif content[:2] == GZIP_MAGIC and len(content) > 2:
            raise DataError(path, "is gzip, and the other files here are not", "use one folder for each kind")
        sample = parse_example(str(path), unframe(str(path), content), labeled=labeled)
        counts = check_counts(path, sample.counts, spec)
        return Sample(counts, check_target(path, sample.target) if labeled else sample.target)


def frame(record: Pieces) -> Pieces:
    """Return `record` in a TFRecord container."""
    length = struct.pack("<Q", sum(map(len, record)))
    return [length, _masked_crc(length), *record, _masked_crc(*record)]


def unframe(path: str, content: bytes | bytearray) -> memoryview:
    """Return the only record in the container `content` of the file `path`.

    Raises:
        DataError: the container is damaged, cut off or longer than one record.
    """
    if not _starts_record(content):
        _raise_if_recognized(path, content)
        if len(content) < _HEADER:
            raise DataError(path, f"is cut off after {len(content)} bytes", REMEDY)
        raise DataError(path, "the CRC of the record's length is wrong", REMEDY)
    (length,) = struct.unpack_from("<Q", content)
    end = _HEADER + length + _FOOTER
    if len(content) < end:
        raise DataError(path, f"is cut off: {len(content)} bytes of {end}", REMEDY)
    if _starts_record(content[end : end + _HEADER]):
        raise DataError(path, "holds more than one record", "write each sample to a file of its own")
    if len(content) > end:
        raise DataError(path, f"{len(content) - end} trailing bytes after its record", REMEDY)
    record = memoryview(content)[_HEADER : end - _FOOTER]
    if _masked_crc(record) != content[end - _FOOTER :]:
        raise DataError(path, "the record's CRC is wrong", REMEDY)
    return record


def _inflate(path: str, content: bytes, spec: SampleSpec) -> bytes | bytearray:
    """Inflate the gzip stream `content`, at most to the record of a sample of `spec`."""
    if not content:
        raise DataError(path, "is empty", REMEDY)
    if content[:2] != GZIP_MAGIC:
        _raise_if_recognized(path, content)
        raise DataError(path, "is not gzip, and the other files here are", "use one folder for each kind")
    limit = spec.bytes + _MAX_OVERHEAD_BYTES
    fast = _inflate_with_libdeflate(content, limit)
    if fast is not None:
        return fast
    stream = zlib_ng.decompressobj(wbits=_GZIP_WBITS)
    try:
        # With the length from the trailer, zlib-ng allocates a buffer of that size once, whose pages malloc
        # reuses; a buffer that grows by doubling faults in every page again.
        inflated = stream.decompress(content, max(1, min(_trailer_length(content), limit)))
        if not stream.eof or stream.unused_data:
            # The last bytes were not the trailer of the only member.
            inflated = _inflate_members(path, content, limit + 1)
    except zlib_ng.error as error:
        raise DataError(path, f"its gzip stream is damaged ({error})", REMEDY) from error
    if len(inflated) > limit:
        fault = f"inflates to more than the {spec.bytes} bytes of a sample of {spec.shape}"
        raise DataError(path, fault, "remove it, or convert it separately from the others")
    return inflated


def _inflate_members(path: str, content: bytes, limit: int) -> bytes:
    """Inflate all gzip members of `content` (RFC 1952, section 2.2), at most to `limit` bytes."""
    view, at, left = memoryview(content), 0, limit
    pieces, stream = [], zlib_ng.decompressobj(wbits=_GZIP_WBITS)
    while at < len(content) and left:
        if stream.eof:
            if content[at : at + 2] != GZIP_MAGIC:
                raise DataError(path, f"{len(content) - at} trailing bytes behind the gzip stream", REMEDY)
            stream = zlib_ng.decompressobj(wbits=_GZIP_WBITS)
        # The stream copies what it does not use, so that many small members need small chunks.
        chunk = view[at : at + _CHUNK]
        pieces.append(stream.decompress(chunk, left))
        left -= len(pieces[-1])
        at += len(chunk) - len(stream.unused_data) - len(stream.unconsumed_tail)
    if left and not stream.eof:
        raise DataError(path, "its gzip stream is cut off", REMEDY)
    return b"".join(pieces)


def _inflate_with_libdeflate(content: bytes, limit: int) -> bytearray | None:
    """Inflate `content` in two thirds of zlib-ng's time; None unless it is exactly one valid gzip member.

    libdeflate checks the trailer of the first member (CRC-32, length) and does not report where that ended.
    It was the end of the file if the length that it found there stands at the end and nowhere before.
    """
    length = _trailer_length(content)
    if deflate is None or not 0 < length <= limit:
        return None
    # rfind takes half the time of find.
    if content.rfind(content[-4:], 0, len(content) - 1) >= 0:
        return None
    try:
        inflated: bytearray = deflate.gzip_decompress(content, length)
    except deflate.DeflateError:
        return None
    return inflated if len(inflated) == length else None


def _starts_record(content: bytes | bytearray | memoryview) -> bool:
    """Return whether `content` begins with a record's length and its CRC."""
    return len(content) >= _HEADER and _masked_crc(content[:8]) == content[8:_HEADER]


def _raise_if_recognized(path: str, content: bytes | bytearray) -> None:
    """Raise DataError if `content` is known to be something other than a record."""
    kind = recognize(bytes(content[:SIGNATURE_BYTES]))
    if kind:
        fault = f"holds {kind} instead of a TFRecord"
        raise DataError(path, fault, "replace it by the TFRecord itself, plain or in gzip")


def _trailer_length(content: bytes) -> int:
    """Return the inflated length that the gzip trailer at the end of `content` states."""
    return int.from_bytes(content[-4:], "little")


def _masked_crc(*pieces: bytes | bytearray | memoryview) -> bytes:
    """Return TFRecord's CRC-32C, rotated right by 15 bits and offset so that CRCs of CRCs stay strong."""
    crc = 0
    for piece in pieces:
        crc = crc32c.crc32c(piece, crc)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
