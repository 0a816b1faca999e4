"""One sample as a TFRecord of one tf.train.Example, plain or in a gzip stream.

The container, little-endian: u64 length, u32 masked CRC-32C of the length, the record, u32 masked
CRC-32C of the record (tensorflow/core/lib/io/record_writer.h). The record is a protobuf message
Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }, and Feature
{ BytesList bytes_list = 1 | FloatList float_list = 2 | Int64List int64_list = 3 }, each list with
`repeated value = 1` (tensorflow/core/example/feature.proto). Feature `x` is a BytesList of one:
counts, C-order little-endian int16, (size, size, size, 4); `y` a FloatList of 4: the target. Maps
have no order, and floats may be packed or not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import crc32c
import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from pipelines.errors import DataError
from pipelines.formats.base import CountsPayload
from pipelines.io import WrittenFile, read_file, write_chunks
from pipelines.sample import PARAMETERS, REDSHIFTS, Sample, SampleSpec, check_counts, check_target

try:
    import deflate
except ImportError:
    deflate = None  # zlib-ng does it alone then.

TFRECORD_SUFFIX, INDEX_SUFFIX = ".tfrecord", ".idx"
GZIP_MAGIC = b"\x1f\x8b"
_GZIP = 16 + 15
"""Asks zlib's interface for one gzip member, its header and its CRC-32 written or checked."""

_LEVEL = 4
_MAX_SIZE, _MAX_OVERHEAD_BYTES = 512, 1 << 20
"""Voxels along the edge of a sample, and bytes that a record has beside its counts, at most: 1 GB in all."""

_HEADER, _FOOTER = 12, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_REMEDY = "fetch or convert the file again"


class TFRecord(NamedTuple):
    """The format with or without gzip around it."""

    name: str
    compressed: bool
    suffix: str = TFRECORD_SUFFIX
    suffixes: tuple[str, ...] = (TFRECORD_SUFFIX,)

    @property
    def extra_suffixes(self) -> tuple[str, ...]:
        """The index of a plain record."""
        return () if self.compressed else (TFRECORD_SUFFIX + INDEX_SUFFIX,)

    def write(self, directory: Path, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write `<sample_id>.tfrecord`, and for a plain one first the index that DALI's own reader wants.

        The index, `<sample_id>.tfrecord.idx`, has a line for each record: its offset and its length in
        bytes, container included, as DALI's tfrecord2idx writes it. DataError for other channels than
        the format has.
        """
        path, channels = directory / f"{sample_id}{self.suffix}", sample.counts.shape[-1]
        if channels != len(REDSHIFTS):
            fault = f"cannot hold {channels} channels: a TFRecord has {len(REDSHIFTS)}"
            raise DataError(path, fault, "use npy or packed")
        content = frame(encode_example(sample))
        if self.compressed:
            # 4% larger than zlib's default, in a seventh of its time. Not isa-l, which is faster still: one
            # process of a few hundred of it makes other bytes of the same content (isa-l's issue 140).
            return (write_chunks(path, zlib_ng.compress(content, _LEVEL, wbits=_GZIP)),)
        index = write_chunks(path.with_name(path.name + INDEX_SUFFIX), f"0 {len(content)}\n".encode())
        return index, write_chunks(path, content)

    def parse(self, path: Path, files: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """The sample, its counts a view of the bytes; both CRCs are checked."""
        name = str(path)
        content: bytes | bytearray = files[TFRECORD_SUFFIX]
        if self.compressed:
            content = _inflate(name, files[TFRECORD_SUFFIX], spec or SampleSpec(_MAX_SIZE))
        elif content[:2] == GZIP_MAGIC and len(content) > 2:
            raise DataError(name, "is gzip, and the other files here are not", "keep the two kinds apart")
        sample = parse_example(name, unframe(name, content))
        return Sample(check_counts(path, sample.counts, spec), check_target(path, sample.target))

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The sample in `path`."""
        return self.parse(path, {TFRECORD_SUFFIX: read_file(path)}, spec)

    def payload(self, path: Path, spec: SampleSpec, *, fully_validate: bool = False) -> CountsPayload:
        """The sample, inflated and checked in full always: no device does that for one long gzip stream."""
        sample = self.read(path, spec)
        return CountsPayload(sample.counts, sample.target)


def frame(record: bytes) -> bytes:
    """`record` in a TFRecord container."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, _masked_crc(length), record, _masked_crc(record)))


def unframe(path: str, content: bytes | bytearray) -> memoryview:
    """The one record in the container `content` of file `path`."""
    if len(content) < _HEADER:
        raise DataError(path, f"is cut off after {len(content)} bytes", _REMEDY)
    if _masked_crc(content[:8]) != content[8:_HEADER]:
        raise DataError(path, "the CRC of the record's length is wrong", _REMEDY)
    (length,) = struct.unpack_from("<Q", content)
    whole = _HEADER + length + _FOOTER
    if len(content) < whole:
        raise DataError(path, f"is cut off: {len(content)} bytes of {whole}", _REMEDY)
    if len(content) > whole:
        raise DataError(path, f"holds {len(content) - whole} bytes behind its one record", _REMEDY)
    record = memoryview(content)[_HEADER : whole - _FOOTER]
    if _masked_crc(record) != content[whole - _FOOTER :]:
        raise DataError(path, "the record's CRC is wrong", _REMEDY)
    return record


def encode_example(sample: Sample) -> bytes:
    """`sample` as a serialised tf.train.Example with features `x` and `y`."""
    x = _field(1, _field(1, np.ascontiguousarray(sample.counts, dtype="<i2").tobytes()))
    y = _field(2, _field(1, sample.target.astype("<f4").tobytes()))
    entries = (_field(1, _field(1, key) + _field(2, value)) for key, value in ((b"x", x), (b"y", y)))
    return _field(1, b"".join(entries))


def parse_example(path: str, record: memoryview) -> Sample:
    """The sample in the serialised tf.train.Example `record` of file `path`."""
    features: dict[bytes, memoryview] = {}
    try:
        for _, body in _messages(record, 1):
            for _, entry in _messages(body, 1):
                parts = dict(_messages(entry, 1, 2))
                features[bytes(parts.get(1, b""))] = parts.get(2, memoryview(b""))
        counts = _bytes_of(path, features)
        target = _floats_of(path, features)
    except (IndexError, struct.error) as error:
        raise DataError(path, f"its record is no tf.train.Example ({error})", _REMEDY) from error
    size = round((len(counts) / 2 / len(REDSHIFTS)) ** (1 / 3))
    spec = SampleSpec(max(size, 1))
    if spec.bytes != len(counts):
        raise DataError(path, f"feature x has {len(counts)} bytes", "no cube of int16 at 4 redshifts has")
    return Sample(np.frombuffer(counts, dtype="<i2").reshape(spec.shape), target)


def _inflate(path: str, content: bytes, spec: SampleSpec) -> bytes | bytearray:
    """What is in the gzip stream `content`: at most the record of a sample of `spec`."""
    if not content:
        raise DataError(path, "is empty", _REMEDY)
    if content[:2] != GZIP_MAGIC:
        raise DataError(path, "is not gzip, and the other files here are", "keep the two kinds apart")
    limit = spec.bytes + _MAX_OVERHEAD_BYTES
    at_once = _inflate_at_once(content, limit)
    if at_once is not None:
        return at_once
    stream = zlib_ng.decompressobj(wbits=_GZIP)
    try:
        # Told the length, which the trailer gives, it makes a buffer no larger, and malloc hands the same
        # pages out again; one that grows by doubling has every page faulted in anew.
        inflated = stream.decompress(content, max(1, min(_trailer_length(content), limit)))
        if not stream.eof:
            # Cut off, or with more behind it, so that was no trailer.
            inflated += stream.decompress(stream.unconsumed_tail, limit + 1 - len(inflated))
    except zlib_ng.error as error:
        raise DataError(path, f"its gzip stream is damaged ({error})", _REMEDY) from error
    if len(inflated) > limit:
        fault = f"inflates to more than the {spec.bytes} bytes of a sample of {spec.shape}"
        raise DataError(path, fault, "remove it, or convert it apart from the others")
    if not stream.eof:
        raise DataError(path, "its gzip stream is cut off", _REMEDY)
    if stream.unused_data:
        raise DataError(path, f"holds {len(stream.unused_data)} bytes behind its gzip stream", _REMEDY)
    return inflated


def _inflate_at_once(content: bytes, limit: int) -> bytearray | None:
    """What libdeflate makes of `content`, in two thirds of the time; None unless it is one sound gzip member.

    libdeflate stops at a member's end and does not say where that was: behind the trailer of what came out.
    So the file's last bytes must be that trailer, and it must not stand anywhere before.
    """
    told = _trailer_length(content)
    if deflate is None or not 0 < told <= limit:
        return None
    try:
        inflated: bytearray = deflate.gzip_decompress(content, told)
    except deflate.DeflateError:
        return None
    trailer = struct.pack("<II", deflate.crc32(inflated), len(inflated))
    again = content.rfind(trailer, 0, len(content) - 1) >= 0
    return inflated if content.endswith(trailer) and not again else None


def _trailer_length(content: bytes) -> int:
    """The inflated length by the gzip trailer at the end of `content`."""
    return int.from_bytes(content[-4:], "little")


def _masked_crc(data: bytes | bytearray | memoryview) -> bytes:
    """TFRecord's CRC-32C: rotated right by 15 bits and offset, so that a CRC of CRCs stays sound."""
    crc = crc32c.crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _field(number: int, body: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, varint = len(body), bytearray()
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | _BYTES, *varint, length]) + body


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a varint of more than ten bytes")


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(number, wire type, body) of each field of a protobuf message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, end = key & 7, at
        if not 0 < key >> 3 < 1 << 29:
            raise IndexError(f"field number {key >> 3}")
        if kind == _BYTES:
            length, at = _varint(message, at)
            end = at + length
        elif kind == _VARINT:
            _, end = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            end = at + (8 if kind == _FIXED64 else 4)
        else:
            raise IndexError(f"wire type {kind}")
        if end > len(message):
            raise IndexError("a field that ends behind its message")
        yield key >> 3, kind, message[at:end]
        at = end


def _messages(message: memoryview, *numbers: int) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields with one of `numbers`; others are another version's, and passed over."""
    return ((number, body) for number, kind, body in _fields(message) if number in numbers and kind == _BYTES)


def _bytes_of(path: str, features: dict[bytes, memoryview]) -> memoryview:
    values = [
        value
        for _, body in _messages(features.get(b"x", memoryview(b"")), 1)
        for _, value in _messages(body, 1)
    ]
    if len(values) != 1:
        raise DataError(path, f"feature x is {len(values)} byte strings", "expected a BytesList of one")
    return values[0]


def _floats_of(path: str, features: dict[bytes, memoryview]) -> npt.NDArray[np.float32]:
    fields = [
        body
        for _, floats in _messages(features.get(b"y", memoryview(b"")), 2)
        for number, kind, body in _fields(floats)
        if number == 1 and kind in (_BYTES, _FIXED32)
    ]
    raw = b"".join(fields)
    if len(raw) != 4 * len(PARAMETERS):
        raise DataError(
            path,
            f"feature y has {len(raw) / 4:g} floats",
            f"expected a FloatList of {len(PARAMETERS)}",
        )
    return np.frombuffer(raw, dtype="<f4")
