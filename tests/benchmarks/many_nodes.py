"""Does `segment` get faster with every node? The same work for each node, on 1, 2 and 4 of them.

    python tests/benchmarks/many_nodes.py

The nodes are logical ones of Ray, all on this machine: each has its own scheduler and object store, 2 CPU slots and a
slot for one worker; a further one, without a worker, stands for the driver's. In place of the network every worker
waits a fixed time for each image, so that the machine's few cores do not limit what the pipeline could hand out. Images
are small.

Images per second are those of all workers together while all are at work; the seconds are those of the whole command,
in which one machine starts the processes of all nodes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import measure
import stand_in
from ray.cluster_utils import Cluster

from pipelines import cluster
from pipelines.config import SegmentConfig
from pipelines.segment import run

STORE = 200 << 20
"""Bytes of a node's object store."""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="how many, rising (default: 1 2 4)")
    parser.add_argument("--model", type=float, default=0.2, help="seconds per image (default: %(default)s)")
    parser.add_argument("--images", type=int, default=120, help="for each node (default: %(default)s)")
    args = parser.parse_args()
    rows: list[list[str]] = []
    machines = Cluster()
    machines.add_node(num_cpus=2, object_store_memory=STORE, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = machines.address
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = stand_in.write_model(root / "model")
        alone = None
        for nodes in args.nodes:
            while len(machines.worker_nodes) < nodes:
                # A logical GPU is what puts one worker on every node, as on a real cluster.
                machines.add_node(num_cpus=2, num_gpus=1, object_store_memory=STORE)
            machines.wait_for_nodes()
            images, log = args.images * nodes, root / f"log-{nodes}"
            shards = stand_in.write_shards(root / f"shards-{nodes}", images, per_shard=64, side=64, boxes=2)
            out = str(root / f"masks-{nodes}")
            start = time.perf_counter()
            config = SegmentConfig(model, shards, out, workers=nodes, gpu=True, checkpoint_images=8)
            run(config, load=stand_in.fixed_time(args.model, log))
            whole = time.perf_counter() - start
            rate = stand_in.rate(log)
            alone = alone or rate / nodes
            rows.append(
                [
                    *(f"{nodes}", f"{images}", f"{rate:.2f}", f"{rate / alone / nodes:.0%}"),
                    *(f"{rate * args.model / nodes:.0%}", f"{whole:.0f}"),
                ]
            )
    cluster.stop()
    machines.shutdown()
    print(f"{args.model * 1000:.0f} ms for each image:\n")
    print(measure.table(["nodes", "images", "images/s", "of linear", "of the workers' time", "command s"], rows))


if __name__ == "__main__":
    main()
