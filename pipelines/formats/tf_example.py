"""One sample as a serialized tf.train.Example.

A protobuf message Example { Features features = 1 }, Features { map<string, Feature> feature = 1 } and
Feature { BytesList bytes_list = 1 | FloatList float_list = 2 | Int64List int64_list = 3 }, each list
with `repeated value = 1` (tensorflow/core/example/feature.proto). Feature `x` is a BytesList of one:
counts, C-order little-endian int16, (size, size, size, 4). Feature `y` is a FloatList of 4: the target.
Map entries come in any order, and floats may be packed or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.sample import PARAMETERS, REDSHIFTS, UNKNOWN_TARGET, Sample, SampleSpec

REMEDY = "fetch or convert the file again"

Pieces: TypeAlias = list[bytes | memoryview]
"""Bytes that follow each other. The counts are a view, which spares copies of a gigabyte."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def encode_example(sample: Sample) -> Pieces:
    """Serialize `sample` as a tf.train.Example with the features `x` and `y`."""
    counts = np.ascontiguousarray(sample.counts, dtype="<i2").data.cast("B")
    x = _field(1, _field(1, [counts]))
    y = _field(2, _field(1, [sample.target.astype("<f4").tobytes()]))
    entries = (_field(1, _field(1, [key]) + _field(2, value)) for key, value in ((b"x", x), (b"y", y)))
    return _field(1, [piece for entry in entries for piece in entry])


def parse_example(path: str, record: memoryview, *, labeled: bool = True) -> Sample:
    """Parse the tf.train.Example `record` of the file `path`; the counts are a view of it.

    Feature `y` is not read unless the sample is `labeled`; see `Format.parse`.

    Raises:
        DataError: `record` is not an example, or its features do not have the layout above.
    """
    features: dict[bytes, memoryview] = {}
    try:
        for _, body in _messages(record, 1):
            for _, entry in _messages(body, 1):
                fields = dict(_messages(entry, 1, 2))
                features[bytes(fields.get(1, b""))] = fields.get(2, memoryview(b""))
        counts = _bytes_feature(path, features.get(b"x", memoryview(b"")))
        target = UNKNOWN_TARGET
        if labeled:
            target = _floats_feature(path, features.get(b"y", memoryview(b"")))
    except IndexError as error:
        raise DataError(path, f"its record is not a tf.train.Example ({error})", REMEDY) from error
    size = round((len(counts) / 2 / len(REDSHIFTS)) ** (1 / 3))
    spec = SampleSpec(max(size, 1))
    if spec.bytes != len(counts):
        fault = f"feature x has {len(counts)} bytes"
        raise DataError(path, fault, f"expected a cube of int16 at {len(REDSHIFTS)} redshifts")
    return Sample(np.frombuffer(counts, dtype="<i2").reshape(spec.shape), target)


def _bytes_feature(path: str, feature: memoryview) -> memoryview:
    values = [value for _, body in _messages(feature, 1) for _, value in _messages(body, 1)]
    if len(values) != 1:
        raise DataError(path, f"feature x is {len(values)} byte strings", "expected a BytesList of one")
    return values[0]


def _floats_feature(path: str, feature: memoryview) -> npt.NDArray[np.float32]:
    raw = b"".join(
        body
        for _, floats in _messages(feature, 2)
        for number, wire_type, body in _fields(floats)
        if number == 1 and wire_type in (_BYTES, _FIXED32)
    )
    if len(raw) != 4 * len(PARAMETERS):
        fault = f"feature y has {len(raw) / 4:g} floats"
        raise DataError(path, fault, f"expected a FloatList of {len(PARAMETERS)}")
    return np.frombuffer(raw, dtype="<f4")


def _field(number: int, body: Pieces) -> Pieces:
    """Encode a length-delimited protobuf field."""
    length, varint = sum(map(len, body)), bytearray()
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    return [bytes([number << 3 | _BYTES, *varint, length]), *body]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Decode the varint at byte `at`; return its value and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a varint of more than ten bytes")


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (number, wire type, body) of each field of a protobuf message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type, end = key >> 3, key & 7, at
        if not 0 < number < 1 << 29:
            raise IndexError(f"field number {number}")
        if wire_type == _BYTES:
            length, at = _varint(message, at)
            end = at + length
        elif wire_type == _VARINT:
            _, end = _varint(message, at)
        elif wire_type in (_FIXED64, _FIXED32):
            end = at + (8 if wire_type == _FIXED64 else 4)
        else:
            raise IndexError(f"wire type {wire_type}")
        if end > len(message):
            raise IndexError("a field reaches past the end of its message")
        yield number, wire_type, message[at:end]
        at = end


def _messages(message: memoryview, *numbers: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the length-delimited fields with one of `numbers`; unknown fields are skipped."""
    return ((number, body) for number, kind, body in _fields(message) if number in numbers and kind == _BYTES)
