"""All sample formats by name."""

from pipelines.formats.base import Format
from pipelines.formats.npy import Npy
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.tfrecord import TFRecord

_ALL = (TFRecord(compressed=True), TFRecord(compressed=False), Npy(), PackedFormat())

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in _ALL}

READ_IN_PART = (Npy.name, PackedFormat.name)
"""Formats of which a slab can be read without the rest of the sample."""
