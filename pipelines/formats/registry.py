"""All sample formats by name."""

from pipelines.formats.base import Format
from pipelines.formats.npy import Npy
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.tfrecord import TFRecord

_ALL = (TFRecord(compressed=True), TFRecord(compressed=False), Npy(), PackedFormat())

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in _ALL}
