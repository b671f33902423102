"""``boxinst shard``: a COCO corpus becomes Parquet shards in which every image and box is accounted for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import cli, options


def main(argv: Sequence[str]) -> int:
    """Write the shards that ``argv`` asks for."""
    from pipelines import shards

    config = options.parse(shards.ShardConfig, argv, command="shard")
    manifest = shards.run(config)
    count = manifest.counts
    for what in ("images", "boxes"):
        print(f"{what}: {count[f'entered_{what}']:,} = {count[what]:,} kept + {count[f'rejected_{what}']:,} rejected")
    print(f"boxes clipped to their image: {count['clipped_boxes']:,}; masks among the labels: {count['masks']:,}")
    if count["rejected_images"] or count["rejected_boxes"] or count["clipped_boxes"] or count["rejected_masks"]:
        print(f"Which ones and why: {config.output}/{shards.REJECTS}")
    cli.close(
        f"{len(manifest.files)} shards with {count['images']:,} images and {count['boxes']:,} boxes",
        config.output,
        then=f"boxinst train --shards {config.output}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["shard", *sys.argv[1:]]))
