"""The formats that samples are kept in, by name."""

from pipelines.formats.base import Format
from pipelines.formats.npy import Npy
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.tfrecord import TFRecord

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        TFRecord("tfrecord_gzip", compressed=True),
        TFRecord("tfrecord", compressed=False),
        Npy(),
        PackedFormat(),
    )
}
