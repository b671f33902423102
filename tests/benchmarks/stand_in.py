"""What the benchmarks of scale put in place of a corpus and of a network, so that all the rest is the real pipeline.

The corpus: shards of the real schema with real JPEG files, one file for all images, so that a large one is written in
seconds. The network: one that takes a fixed time and gives every box as its mask. It notes when it worked.
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

import boxinst
from boxinst.metrics import filled_box
from pipelines import storage
from pipelines.schema import SHARD_SCHEMA, Category, Manifest

CLASSES = ("thing",)

ROW_GROUP = 256
"""Images of a row group."""


def write_shards(out: Path, images: int, *, per_shard: int, side: int, boxes: int) -> str:
    """Write ``images`` copies of one picture of side × side pixels, ``boxes`` boxes in each. Returns the folder."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (max(side // 8, 1),) * 2 + (3,), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    corner = rng.uniform(0, side * 0.7, (boxes, 2))
    given = np.concatenate([corner, corner + side * 0.3], 1).astype(np.float32).tolist()
    row = {"image": stream.getvalue(), "width": side, "height": side, "boxes": given, "labels": [0] * boxes}
    row |= {"masks": [None] * boxes, "crowd": [False] * boxes}

    def groups(first: int, stop: int) -> list[pa.Table]:
        return [
            pa.Table.from_pylist(
                [
                    {
                        "image_id": k,
                        "file_name": f"{k:09d}.jpg",
                        "annotation_ids": [k * boxes + n for n in range(boxes)],
                        **row,
                    }
                    for k in range(start, min(start + ROW_GROUP, stop))
                ],
                schema=SHARD_SCHEMA,
            )
            for start in range(first, stop, ROW_GROUP)
        ]

    files = [
        storage.write_parquet(
            f"{out}/shard-{number:05d}.parquet", groups(first, min(first + per_shard, images)), SHARD_SCHEMA
        )
        for number, first in enumerate(range(0, images, per_shard))
    ]
    counts = {"images": images, "boxes": images * boxes}
    storage.write_manifest(str(out), Manifest("shards", [Category(1, CLASSES[0])], files, counts))
    return str(out)


def write_model(out: Path, backbone: str = "resnet18") -> str:
    """A network of random weights, which gives the pipeline its configuration. Returns the folder."""
    torch.manual_seed(0)
    boxinst.save(boxinst.CondInst(boxinst.ModelConfig(classes=CLASSES, backbone=backbone, prompt=True)), out)
    return str(out)


class FixedTime:
    """Stands where a ``CondInst`` would: a mask for every box, after a fixed time for every image.

    Args:
        seconds: per image.
        log: folder where each process notes, per call, when it began, when it ended and how many images it had.
    """

    def __init__(self, seconds: float, log: str) -> None:
        self.seconds, self._log = seconds, Path(log) / f"{os.getpid()}.txt"

    def segment(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[boxinst.Instances]:
        """As ``CondInst.segment``."""
        start = time.time()
        found = []
        for image, given in zip(images, boxes, strict=True):
            masks = filled_box(given, image.shape[1], image.shape[2])
            found.append(boxinst.Instances(given, torch.ones(len(given)), torch.zeros(len(given)).long(), masks))
        time.sleep(max(self.seconds * len(images) - (time.time() - start), 0))
        with self._log.open("a") as log:
            log.write(f"{start} {time.time()} {len(images)}\n")
        return found


def fixed_time(seconds: float, log: Path) -> Callable[..., FixedTime]:
    """For ``segment.run(load=...)``: every worker gets a ``FixedTime``."""
    log.mkdir(parents=True, exist_ok=True)
    return functools.partial(_load, seconds, str(log))


def _load(
    seconds: float, log: str, files: Callable[[], Mapping[str, bytes]], *, device: str, threads: int
) -> FixedTime:
    torch.set_num_threads(max(threads, 1))
    files()  # the weights travel to the worker, as they would
    return FixedTime(seconds, log)


def calls(log: Path) -> list[np.ndarray]:
    """What the workers noted: of each, float [calls, 3] of start, end and images."""
    return [np.loadtxt(path, ndmin=2) for path in sorted(log.iterdir())]


def rate(log: Path) -> float:
    """Images per second while all workers were at work: from the last one's first image to the first one's last."""
    noted = calls(log)
    begin, end = max(c[0, 0] for c in noted), min(c[-1, 1] for c in noted)
    images = 0.0
    for start, stop, count in np.concatenate(noted):
        images += count * max(min(stop, end) - max(start, begin), 0) / (stop - start)
    return images / (end - begin)
