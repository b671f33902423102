"""Cut a COCO file of any length into pieces by its images, so that each can be sharded on its own.

boxinst cut --annotations s3://lab/all.json --out s3://lab/pieces
boxinst cut --annotations all.json --images-per-piece 200000 --out pieces

Needed from some ten million boxes on, as `shard` holds all of a file in memory and this does not. Each piece is a COCO
file with the same classes; shard and segment them one by one or at the same time, on one machine or many.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import cli, options
from pipelines.config import CutConfig


def main(argv: Sequence[str]) -> int:
    """Write the pieces that ``argv`` asks for."""
    config = options.parse(CutConfig, argv, command="cut", about=__doc__)
    from pipelines import pieces

    manifest = pieces.run(config)
    n, number = manifest.counts, len(manifest.files)
    print(f"{n['images']:,} images and {n['boxes']:,} boxes, all of the file, in {cli.count(number, 'piece')};")
    largest = max(file.rows for file in manifest.files)
    print(f"at most {cli.count(largest, 'image')} and {cli.count(n['most_boxes'], 'box')} in one of them")
    first = f"{config.output}/{manifest.files[0].path}"
    then = f"boxinst shard --annotations {first} --images IMAGES   (and so each piece)"
    cli.close(cli.count(number, "piece"), config.output, then=then)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["cut", *sys.argv[1:]]))
