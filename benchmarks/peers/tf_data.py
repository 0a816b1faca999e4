"""Rows of tf.data, as the reference of MLPerf HPC reads its TFRecords."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.peers.contract import AHEAD, WORKERS, Item, Job, Peer, Resume
from benchmarks.peers.volumes import CHANNELS
from benchmarks.samples import write_samples
from pipelines.sample import PARAMETERS

_RESUME = Resume(True, False, "tf.data guide, Iterator Checkpointing: the state of one iterator")


def _open(compression: str, job: Job) -> Iterator[Item]:
    import tensorflow as tf

    features = {
        "x": tf.io.FixedLenFeature([], tf.string),
        "y": tf.io.FixedLenFeature([len(PARAMETERS)], tf.float32),
    }

    def parse(record: Any) -> tuple[Any, Any]:
        parsed = tf.io.parse_single_example(record, features)
        counts = tf.reshape(tf.io.decode_raw(parsed["x"], tf.int16), [1, *[job.size] * 3, CHANNELS])
        return tf.math.log1p(tf.cast(counts, tf.float32)), parsed["y"]

    paths = sorted(str(path) for path in job.folder.glob("*.tfrecord"))
    files = tf.data.Dataset.from_tensor_slices(paths).shuffle(job.samples).repeat(job.epochs)
    records = files.interleave(
        partial(tf.data.TFRecordDataset, compression_type=compression),
        cycle_length=WORKERS,
        num_parallel_calls=WORKERS,
    )
    dataset = records.map(parse, num_parallel_calls=WORKERS).prefetch(AHEAD)
    options = tf.data.Options()
    options.threading.private_threadpool_size = WORKERS
    for volume, target in dataset.with_options(options):
        yield torch.utils.dlpack.from_dlpack(volume).permute(0, 4, 1, 2, 3), target.numpy()


PEERS = [
    Peer(
        f"tf.data, TFRecord{', gzip' if compression else ''}",
        ("tensorflow",),
        format_name,
        partial(write_samples, format_name),
        partial(_open, compression),
        _RESUME,
    )
    for format_name, compression in (("tfrecord", ""), ("tfrecord_gzip", "GZIP"))
]
