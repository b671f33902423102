"""Does the memory of `segment` grow with the corpus? The driver and the workers, for a small and a large one.

    python tests/benchmarks/memory.py

Each corpus in a process of its own: shards of small JPEG files with one box each, 2,500 images a shard, and a model
that takes no time. Twice a second the memory of the driver and of every process that Ray has started is read from
Linux: what a process has for itself (RssAnon), and all that it has in RAM (VmRSS), with libraries and the part of Ray's
object store that it has looked at, which all processes share and whose size Ray limits. The table shows the most that
was seen, of the workers that of the largest one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import measure
import stand_in

from pipelines import cluster
from pipelines.config import SegmentConfig
from pipelines.segment import run

PER_SHARD = 2500
FIELDS = ("RssAnon", "VmRSS")


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            parents.setdefault(parent, []).append(int(folder.name))
    found, new = set(), [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found.update(new)
    return found


class Watch(threading.Thread):
    """Reads the memory of this process and of Ray's workers until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, dict[str, int]] = {}
        """MiB by kind of process and by field."""
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            for pid in {os.getpid(), *descendants(os.getpid())}:
                try:
                    name = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                kind = "driver" if pid == os.getpid() else "worker" if name.startswith("ray::") else ""
                if not kind:
                    continue  # Ray's own servers
                most = self.most.setdefault(kind, dict.fromkeys(FIELDS, 0))
                for line in lines:
                    field, _, value = line.partition(":")
                    if field in FIELDS:
                        most[field] = max(most[field], int(value.split()[0]) // 1024)

    def stop(self) -> dict[str, dict[str, int]]:
        """The most of each."""
        self._ended.set()
        self.join()
        return self.most


def work(images: int) -> None:
    """Segment a corpus of so many images and print what it took, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = stand_in.write_shards(root / "shards", images, per_shard=PER_SHARD, side=16, boxes=1)
        model = stand_in.write_model(root / "model")
        watch = Watch()
        watch.start()
        start = time.perf_counter()
        config = SegmentConfig(model, shards, str(root / "masks"), batch_size=64)
        manifest = run(config, load=stand_in.fixed_time(0, root / "log"))
        seconds = time.perf_counter() - start
        most = watch.stop()
        cluster.stop()
        assert manifest.counts["ok"] == images
    print(json.dumps({"images": images, "seconds": seconds, "most": most}))


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 200_000], help="sizes of the corpora")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    rows = []
    first: dict[str, dict[str, int]] = {}
    for images in args.images:
        done = subprocess.run([sys.executable, __file__, "--work", str(images)], stdout=subprocess.PIPE, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        most = told["most"]
        first = first or most
        row = [f"{images:,}", f"{told['seconds']:.0f}"]
        for kind in ("driver", "worker"):
            row += [f"{most[kind][field]}" for field in FIELDS]
            row += [f"{most[kind]['RssAnon'] / first[kind]['RssAnon']:.2f}"]
        rows.append(row)
    header = ["images", "seconds", "driver MiB", "in RAM", "ratio", "worker MiB", "in RAM", "ratio"]
    print(measure.table(header, rows))


if __name__ == "__main__":
    main()
