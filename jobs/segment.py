"""Make one mask for every box of the shards. Run again after a stop: nothing is lost, nothing made twice.

boxinst segment --model models:/cells@champion --shards shards/train --out masks/train --coco masks.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from jobs import cli, options, plan
from pipelines.config import SegmentConfig
from pipelines.forecast import Outcome


def main(argv: Sequence[str]) -> int:
    """Segment as ``argv`` asks."""
    config = options.parse(SegmentConfig, argv, command="segment", about=__doc__)
    from pipelines import segment, storage

    began, at_once = time.monotonic(), not storage.list_files(config.output)
    used: dict[str, float] = {}
    manifest = segment.run(config, report=used.update)
    n = manifest.counts
    print(f"boxes: {n['boxes']:,} = {n['ok']:,} with a mask + {n['empty']:,} empty + {n['errors']:,} errors")
    if config.coco:
        print(f"COCO results: {config.coco}")
    if at_once:
        written = sum(file.bytes for file in manifest.files)
        plan.compare("segment", config, Outcome(time.monotonic() - began, written, used))
    made = f"masks for {cli.count(n['boxes'], 'box')} on {cli.count(n['images'], 'image')}"
    cli.close(made, config.output, then=f"boxinst review --masks {config.output} --shards {config.shards} --app")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["segment", *sys.argv[1:]]))
