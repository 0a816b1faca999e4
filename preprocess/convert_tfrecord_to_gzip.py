"""`preprocess.convert --to tfrecord_gzip` under the name that users of the original know.

python -m preprocess.convert_tfrecord_to_gzip -i <data_dir>/train -o <destination_dir>/train -c gzip
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from preprocess.convert import convert_tfrecords


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return convert_tfrecords("convert_tfrecord_to_gzip", "tfrecord_gzip", argv)


if __name__ == "__main__":
    exit_now(main(), World.detect())
