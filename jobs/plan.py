"""Say what a train or segment command will take, before it is run: hours, memory, storage, requests, money.

  boxinst plan segment --model models:/cells/1 --shards s3://bucket/shards/train --workers 8
  boxinst plan --price 2.5 train --recipe coco_r50_1x --shards s3://bucket/shards/train --name coco --gpu

The options of the plan come first, then the command with its options as they will be given. A few images are read and
tried in one worker, which takes a minute; nothing is written but the plan. When the command has run, it shows its
figures beside the planned ones. To try on the machines of a cluster: boxinst submit ... -- plan segment ...
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from boxinst.errors import InputError
from jobs import cli, options
from pipelines import forecast
from pipelines.config import SegmentConfig, TrainConfig, linear_rule
from pipelines.forecast import Forecast, Outcome, PlanConfig


def main(argv: Sequence[str]) -> int:
    """Plan the command among ``argv``."""
    split = next((k for k, word in enumerate(argv) if word in cli.COMMANDS), len(argv))
    before = [word for word in argv[:split] if word != "--"]  # as submit wants it, and nobody else
    wanted, words = options.parse(PlanConfig, before, command="plan", about=__doc__), argv[split:]
    if not words or words[0] not in ("train", "segment"):
        remedy = "Give train or segment, with its options, such as: boxinst plan --price 2 segment --model ..."
        raise InputError("the command to plan", words[0] if words else "missing", remedy)
    config, planned = (segmenting if words[0] == "segment" else training)(words[1:], wanted)
    print(forecast.table(planned.rows()))
    cli.close("a plan", str(planned.keep(config)), then=shlex.join(["boxinst", *words]))
    return 0


def segmenting(words: Sequence[str], wanted: PlanConfig) -> tuple[SegmentConfig, Forecast]:
    """Of ``boxinst segment WORDS``."""
    config = options.parse(SegmentConfig, words, command="segment", about=__doc__)
    from pipelines import plan

    return config, plan.segmenting(config, wanted)


def training(words: Sequence[str], wanted: PlanConfig) -> tuple[TrainConfig, Forecast]:
    """Of ``boxinst train WORDS``."""
    _, config = options.parse_following(TrainConfig, words, command="train", about=__doc__, follow=linear_rule)
    from pipelines import plan, train

    train.check_storage(config)
    index, val = train.open_shards(config)
    complete, init = train.complete(config, index)
    return config, plan.training(complete, init, index, val, wanted)


def compare(command: str, config: object, outcome: Outcome) -> None:
    """At the end of a command that did all of its work at once: show its figures beside those of its plan, if any."""
    planned = forecast.find(command, config)
    if planned:
        print(f"Planned, and what came of it:\n{forecast.compare(planned, outcome)}")


if __name__ == "__main__":
    sys.exit(cli.main(["plan", *sys.argv[1:]]))
