"""Bring masks into a FiftyOne dataset, the worst first beside a random sample, and judge them in its App.

  boxinst review --masks masks/train --shards shards/train --app

In the App: choose a saved view, select masks, tag them accept, reject or fix; correct masks in the Annotate tab.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import cli, options
from pipelines.config import ReviewConfig


def main(argv: Sequence[str]) -> int:
    """Write the review dataset that ``argv`` asks for, and open it where asked."""
    config = options.parse(ReviewConfig, argv, command="review", about=__doc__)
    from pipelines import review

    result = review.run(config)
    print(result)
    then = f"boxinst feedback --dataset {result.dataset}"
    if not config.app:
        then = f"boxinst review --masks {config.masks} --shards {config.shards} --dataset {result.dataset} --app"
    cli.close(f"a review of {cli.count(result.boxes, 'box')}", f"FiftyOne dataset {result.dataset!r}", then=then)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["review", *sys.argv[1:]]))
