"""How soon does a run that goes on do useful work? `segment` on 1,000 shards of which 990 are done.

    python tests/benchmarks/resume.py

A run is killed as soon as it has claimed its output folder. What it would have written until nearly all shards were
done is put there: parts of 64 images, and their records. Then the same command goes on in a process of its own, to the
end. Beside it stands a new run that has no more shards than are left. The model takes 20 ms for each image.

The columns: seconds from the start of the process to the first image in the model, with Python, torch and Ray starting
in them; of these, seconds to find the shards that are left; and the seconds of the whole command, in which all mask
rows are read and published, also those made before.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
import pyarrow as pa
import stand_in
import torch

from boxinst import rle
from pipelines import maskrows, storage
from pipelines.config import SegmentConfig
from pipelines.maskrows import BoxMask
from pipelines.segment import run

PER_SHARD, PER_PART, SIDE, BOXES = 64, 64, 128, 2
SECONDS = 0.02


def work(shards: str, model: str, out: str, log: str) -> None:
    """The run itself."""
    run(SegmentConfig(model, shards, out), load=stand_in.fixed_time(SECONDS, Path(log)))


def start(*folders: str) -> subprocess.Popen[bytes]:
    """The run, in a process of its own."""
    return subprocess.Popen([sys.executable, __file__, "--work", *folders])


def leave_unfinished(out: Path, images: int, process: subprocess.Popen[bytes]) -> None:
    """Kill a run that has just begun, and put there what it would have written for the first ``images`` images."""
    while not (out / storage.CLAIM).exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    mask = rle.encode(torch.ones(1, SIDE, SIDE, dtype=torch.bool))[0]
    masks = [BoxMask(mask, 0.5, 0.5, 0.0, 1.0, "ok")] * BOXES
    for number, first in enumerate(range(0, images, PER_PART)):
        ids = range(first, min(first + PER_PART, images))
        rows = [
            maskrows.part_row(
                {
                    "image_id": k,
                    "file_name": f"{k:09d}.jpg",
                    "width": SIDE,
                    "height": SIDE,
                    "annotation_ids": [k * BOXES + n for n in range(BOXES)],
                    "labels": [0] * BOXES,
                    "boxes": [[0.0, 0.0, SIDE, SIDE]] * BOXES,
                },
                masks,
            )
            for k in ids
        ]
        name = f"0_{number:06d}"
        part = pa.Table.from_pylist(rows, schema=maskrows.PART_SCHEMA)
        storage.write_parquet(f"{out}/{maskrows.PARTS}/{name}-0.parquet", [part], maskrows.PART_SCHEMA)
        record = pa.table({"image_id": np.array(ids, np.int64)})
        storage.write_parquet(f"{out}/{maskrows.DONE}/{name}.parquet", [record], record.schema)


def measured(root: Path, shards: int, done: int, model: str) -> list[str]:
    """A row of the table."""
    folder = root / f"{shards}-{done}"
    corpus = stand_in.write_shards(folder / "shards", shards * PER_SHARD, per_shard=PER_SHARD, side=SIDE, boxes=BOXES)
    out, log = folder / "masks", folder / "log"
    finding = 0.0
    if done:
        leave_unfinished(out, done * PER_SHARD, start(corpus, model, str(out), str(folder / "log of the killed")))
        begin = time.perf_counter()
        left = maskrows.unfinished(str(out), corpus, storage.read_manifest(corpus, "shards"))
        finding = time.perf_counter() - begin
        assert len(left) == shards - done
    begin = time.time()
    code = start(corpus, model, str(out), str(log)).wait()
    whole = time.time() - begin
    if code:
        raise SystemExit(f"the run ended with code {code}")
    calls = np.concatenate(stand_in.calls(log))
    assert calls[:, 2].sum() == (shards - done) * PER_SHARD
    assert storage.read_manifest(str(out), "masks").counts["ok"] == shards * PER_SHARD * BOXES
    first = calls[:, 0].min() - begin
    return [f"{shards:,}", f"{done:,}", f"{first:.1f}", f"{finding:.1f}" if done else "-", f"{whole:.0f}"]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000, help="of the run (default: %(default)s)")
    parser.add_argument("--left", type=int, default=10, help="shards that are not done (default: %(default)s)")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = stand_in.write_model(root / "model")
        rows = [measured(root, args.left, 0, model), measured(root, args.shards, args.shards - args.left, model)]
    print(f"Shards of {PER_SHARD} images:\n")
    print(measure.table(["shards", "done", "first image after s", "finding what is left s", "command s"], rows))


if __name__ == "__main__":
    main()
