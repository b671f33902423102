"""Memory that it takes to find a corpus of 1,000 images in a bucket of ever more objects.

  python tests/benchmarks/listing.py --keys 20000 200000

A server on the loopback address makes up the listing. Each row is a process of its own: "page by page" is what
`boxinst shard` does, "whole" is Arrow's listing as one list, for comparison. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

ROOT = Path(__file__).resolve().parents[2]
CORPUS = 1000
WAYS = {"page by page": "ours", "whole": "arrow"}


class Listing(BaseHTTPRequestHandler):
    """ListObjectsV2 of a bucket named after its number of objects, 1,000 at a time."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        total, query = int(parts.path.strip("/").removeprefix("bucket-")), dict(parse_qsl(parts.query))
        start = int(query.get("continuation-token", 0))
        stop = min(start + 1000, total)
        entries = "".join(
            f"<Contents><Key>images/{k:09d}.jpg</Key><Size>{k}</Size>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for k in range(start, stop)
        )
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < total else ""
        said = f"<Name>b</Name><IsTruncated>{str(stop < total).lower()}</IsTruncated>{more}{entries}"
        body = f"<ListBucketResult>{said}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def peak() -> float:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, keys: int) -> None:
    """Print peak memory before and after, and seconds."""
    import pyarrow.fs as pafs

    from pipelines import shards, storage
    from pipelines.coco import Corpus, ImageEntry
    from pipelines.config import ShardConfig

    uri = f"s3://bucket-{keys}/images"
    names = [f"{k:09d}.jpg" for k in range(0, keys, keys // CORPUS)]
    corpus = Corpus([], [ImageEntry(k, name, 1, 1, []) for k, name in enumerate(names)], [], len(names), 0)
    next(storage.walk("s3://bucket-1000/images"))  # makes the client
    fs, path = storage.fs_path(uri)
    before, start = peak(), time.perf_counter()
    if way == "ours":
        found = len(shards._match(corpus, ShardConfig("a.json", uri, "out")))
    else:
        listed = {info.base_name for info in fs.get_file_info(pafs.FileSelector(path, recursive=True))}
        found = len(listed.intersection(names))
    assert found == CORPUS, found
    print(before, peak(), time.perf_counter() - start)


def main() -> None:
    """Measure each way for each number of keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure[0], int(asked.measure[1]))
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "PYTHONPATH": str(ROOT)}
    print("| objects | listed | MB before | MB at most | growth MB | s |\n|---|---|---|---|---|---|")
    for way, name in WAYS.items():
        for number in asked.keys:
            words = [sys.executable, __file__, "--measure", name, str(number)]
            said = subprocess.run(words, env=os.environ | keys | address, capture_output=True, text=True, check=True)
            before, after, seconds = map(float, said.stdout.split())
            memory = f"{before:.0f} | {after:.0f} | {after - before:.1f}"
            print(f"| {number:,} | {way} | {memory} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
