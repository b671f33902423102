"""Turn the verdicts of a review into the next corpus: accepted and corrected masks become labels, the rest stay boxes.

boxinst feedback --dataset review --out corpus2/train.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import cli, options
from pipelines.config import FeedbackConfig


def main(argv: Sequence[str]) -> int:
    """Write the corpus that ``argv`` asks for."""
    config = options.parse(FeedbackConfig, argv, command="feedback", about=__doc__)
    from pipelines import feedback

    result = feedback.run(config)
    for outcome, number in result.outcomes.items():
        print(f"  {outcome:12}{number:8,}")
    made = f"a corpus of {cli.count(result.images, 'image')} and {cli.count(result.boxes, 'box')}, "
    made += f"{result.masks:,} of them with a mask"
    cli.close(made, result.out, then=f"boxinst shard --annotations {result.out} --images IMAGES   (the same images)")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["feedback", *sys.argv[1:]]))
