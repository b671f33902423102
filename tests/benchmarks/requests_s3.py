"""What does `segment` ask of an object store? Requests counted by a server, for a run that is new and nothing else.

    python tests/benchmarks/requests_s3.py

Shards, parts and masks lie on an S3 server in this process, which logs every request. Two runs, one with more shards
than the other; what the second asks for more, divided by the shards that it has more, is the cost of a shard, and the
rest that of the run. Each shard holds as many images as a part, so that a part can be told from a shard by its folder.
The second table has beside it what `boxinst plan` foretells.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import boto3
import measure
import stand_in
from moto.server import ThreadedMotoServer

from pipelines import cluster, maskrows, plan, storage
from pipelines.config import SegmentConfig
from pipelines.forecast import PlanConfig
from pipelines.segment import run

IMAGES = 16
"""In a shard, and in a part."""
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "LIST")


class Requests(logging.Handler):
    """Counts the lines of the server's log by method and by what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"(GET|HEAD|PUT|POST|DELETE) /([^ ]*) HTTP", record.getMessage())
        if not found:
            return
        method, path = found.groups()
        if method == "GET" and "list-type" in path:
            method = "LIST"
        what = "manifests, folders, listings"
        if "/shards/shard-" in path:
            what = "shards"
        elif re.search(rf"/{maskrows.PARTS}(%2F|/).*parquet", path):
            what = "parts"
        elif re.search(rf"/{maskrows.DONE}(%2F|/).*parquet", path):
            what = "records of parts"
        elif "/masks-" in path:
            what = "mask files"
        self.counts[what, method] += 1


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs=2, default=[4, 16], help="of the two runs (default: %(default)s)")
    args = parser.parse_args()
    log = logging.getLogger("werkzeug")
    log.setLevel(logging.INFO)
    log.propagate = False
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none-at-all"}
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bench")
    counted, foretold = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = stand_in.write_model(root / "model")
        for shards in args.shards:
            local = stand_in.write_shards(root / f"{shards}", shards * IMAGES, per_shard=IMAGES, side=32, boxes=2)
            for file in Path(local).iterdir():
                storage.write_bytes(f"s3://bench/{shards}/shards/{file.name}", file.read_bytes())
            config = SegmentConfig(
                model, f"s3://bench/{shards}/shards", f"s3://bench/{shards}/out", checkpoint_images=IMAGES
            )
            requests = Requests()
            log.handlers = [requests]
            run(config, load=stand_in.fixed_time(0, root / "log"))
            log.handlers = []
            counted.append(requests.counts)
            foretold.append(plan.segmenting(config, PlanConfig(seconds=1)).work.requests)
    cluster.stop()
    server.stop()
    few, many = counted
    more = args.shards[1] - args.shards[0]
    rows = []
    for what in dict.fromkeys(what for what, _ in sorted(many)):
        each = {method: (many[what, method] - few[what, method]) / more for method in METHODS}
        rest = sum(few[what, method] - each[method] * args.shards[0] for method in METHODS)
        rows.append([what, *(f"{each[method]:.1f}" for method in METHODS), f"{rest:.0f}"])
    print(f"Requests for each shard of {IMAGES} images, which is also a part:\n")
    print(measure.table(["of", *METHODS, "of the run"], rows))
    rows = [
        [str(shards), str(sum(counts.values())), str(planned)]
        for shards, counts, planned in zip(args.shards, counted, foretold, strict=True)
    ]
    more_counted, more_planned = (sum(many.values()) - sum(few.values())) / more, (foretold[1] - foretold[0]) / more
    rows.append(["each further", f"{more_counted:.1f}", f"{more_planned:.1f}"])
    print(f"\n{measure.table(['shards', 'requests', 'planned'], rows)}")


if __name__ == "__main__":
    main()
