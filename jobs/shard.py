"""Turn a COCO corpus into Parquet shards in which every image and box is accounted for.

boxinst shard --annotations train.json --images images --out shards/train
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import cli, options
from pipelines.config import ShardConfig


def main(argv: Sequence[str]) -> int:
    """Write the shards that ``argv`` asks for."""
    config = options.parse(ShardConfig, argv, command="shard", about=__doc__)
    from pipelines import shards

    manifest = shards.run(config)
    n = manifest.counts
    for what in ("images", "boxes"):
        print(f"{what}: {n[f'entered_{what}']:,} = {n[what]:,} kept + {n[f'rejected_{what}']:,} rejected")
    print(f"boxes clipped to their image: {n['clipped_boxes']:,}; masks among the labels: {n['masks']:,}")
    if any(n[key] for key in ("rejected_images", "rejected_boxes", "rejected_masks", "clipped_boxes")):
        print(f"which ones and why: {config.output}/{shards.REJECTS}")
    made = f"{cli.count(len(manifest.files), 'shard')} with {cli.count(n['images'], 'image')}"
    cli.close(
        f"{made} and {cli.count(n['boxes'], 'box')}", config.output, then=f"boxinst train --shards {config.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["shard", *sys.argv[1:]]))
