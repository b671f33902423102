"""What reaches the user of a model's speed: `segment` beside plain loops over the same images.

    python tests/benchmarks/overhead.py
    python tests/benchmarks/overhead.py --model 0.2 --images 400

Shards of JPEG files of 480 × 480 pixels with 10 boxes each; one worker. The model takes a fixed time for each image
(0: none, so that only decoding, the measures of the masks and their encoding are left), and does not use a core while
it waits, as if it ran on a GPU. Four ways:

- the bare model: a loop over images that are decoded already, and nothing after it;
- a plain loop: read, decode, model, measure and encode the masks, one after the other in one process, without Ray;
- `segment`, while it works: images per second of the model from its first image to its last;
- `segment`, the whole command, with the start of Ray and of the worker and with publishing the masks.

Before that the decoding alone: a plain loop that reads and decodes beside Ray Data that does so in one task at a time,
from the first batch that arrives to the last.

Seconds are those of the clock, so other work on the machine shows in them.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import measure
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import stand_in
import torch

from pipelines import cluster, storage
from pipelines.config import Resolution, SegmentConfig
from pipelines.samples import sample_from_row
from pipelines.segment import run
from pipelines.segmenter import Segmenter

BATCH = 4


def tables(shards: str) -> list[pa.Table]:
    """The rows in batches."""
    paths = storage.shard_files(shards, storage.read_manifest(shards, "shards"))
    batches = itertools.chain.from_iterable(pq.ParquetFile(p).iter_batches(batch_size=BATCH) for p in paths)
    return [pa.Table.from_batches([batch]) for batch in batches]


def bare(shards: str, seconds: float, log: Path) -> float:
    """Images per second of the model alone."""
    model, some = stand_in.fixed_time(seconds, log)(dict, device="cpu", threads=1), tables(shards)[:25]
    samples = [[sample_from_row(row, with_masks=False)[:2] for row in table.to_pylist()] for table in some]
    start = time.perf_counter()
    for batch in samples:
        model.segment([image for image, _ in batch], [targets.boxes for _, targets in batch])
    return sum(map(len, samples)) / (time.perf_counter() - start)


def loop(shards: str, seconds: float, log: Path) -> float:
    """Images per second of the worker's own code without Ray, on the first 100 images."""
    load = stand_in.fixed_time(seconds, log)
    worker = Segmenter(lambda: load(dict, device="cpu", threads=1), Resolution(0, 1333), "stored")  # type: ignore[arg-type, return-value]
    some = tables(shards)[:25]
    worker(some[0])
    start = time.perf_counter()
    for table in some:
        worker(table)
    return sum(map(len, some)) / (time.perf_counter() - start)


def decode(table: pa.Table) -> pa.Table:
    """Decode the images of a batch, and keep their ids alone."""
    for row in table.to_pylist():
        sample_from_row(row, with_masks=False)
    return table.select(["image_id"])


def decoding_in_a_loop(shards: str) -> float:
    """Images per second of reading and decoding, without Ray."""
    start = time.perf_counter()
    images = sum(len(decode(table)) for table in tables(shards))
    return images / (time.perf_counter() - start)


def decoding_by_ray(shards: str) -> float:
    """Images per second of reading and decoding by Ray Data, once the first batch is there."""
    cluster.start()
    paths = storage.shard_files(shards, storage.read_manifest(shards, "shards"))
    rows = ray.data.read_parquet(paths, concurrency=1)
    decoded = rows.map_batches(decode, batch_size=BATCH, batch_format="pyarrow", concurrency=1)
    arrived = [(time.perf_counter(), len(batch["image_id"])) for batch in decoded.iter_batches(batch_size=None)]
    cluster.stop()
    return sum(images for _, images in arrived[1:]) / (arrived[-1][0] - arrived[0][0])


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=float, nargs="+", default=[0.0, 0.05, 0.1], help="seconds per image")
    parser.add_argument("--images", type=int, default=400, help="of the run (default: %(default)s)")
    parser.add_argument("--decoded", type=int, default=4000, help="images to decode alone (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = stand_in.write_shards(root / "shards", args.images, per_shard=256, side=480, boxes=10)
        model = stand_in.write_model(root / "model")
        many = stand_in.write_shards(root / "many", args.decoded, per_shard=256, side=480, boxes=10)
        by_loop, by_ray = decoding_in_a_loop(many), decoding_by_ray(many)
        for seconds in args.model:
            of_model = bare(shards, seconds, root / f"bare-{seconds}")
            of_loop = loop(shards, seconds, root / f"loop-{seconds}")
            log, out = root / f"log-{seconds}", str(root / f"masks-{seconds}")
            start = time.perf_counter()
            run(SegmentConfig(model, shards, out, batch_size=BATCH), load=stand_in.fixed_time(seconds, log))
            whole = args.images / (time.perf_counter() - start)
            cluster.stop()
            working = stand_in.rate(log)
            rows.append(
                [
                    f"{seconds * 1000:.0f} ms" if seconds else "none",
                    *(f"{rate:.1f}" for rate in (of_model, of_loop, working, whole)),
                    f"{working / of_loop:.2f}",
                    f"{working / of_model:.0%}" if seconds else "-",
                    f"{args.images / whole - args.images / working:.0f}",
                ]
            )
    header = ["model", "bare", "loop", "segment", "whole command", "segment / loop", "segment / bare", "fixed seconds"]
    print(f"Decoding alone, images per second, {args.decoded} images:\n")
    print(
        measure.table(["loop", "Ray Data", "ratio"], [[f"{by_loop:.1f}", f"{by_ray:.1f}", f"{by_ray / by_loop:.0%}"]])
    )
    print(f"\nImages per second, {args.images} images:\n")
    print(measure.table(header, rows))


if __name__ == "__main__":
    main()
