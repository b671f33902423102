"""Train a model on shards, from boxes alone or with some masks; track it, register it. Run again to resume.

  boxinst train --recipe nuclei --shards shards/train --val shards/val --name cells
  boxinst train --recipe nuclei --shards shards/train2 --name cells2 --init models:/cells@champion

Ctrl-C stops after the present step with a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import reduce

from jobs import cli, options, plan
from pipelines.config import FOLLOWING, TrainConfig, linear_rule
from pipelines.forecast import Outcome


def main(argv: Sequence[str]) -> int:
    """Train as ``argv`` asks."""
    asked, config = options.parse_following(TrainConfig, argv, command="train", about=__doc__, follow=linear_rule)
    if config.reference_batch_size != asked.reference_batch_size:
        print(f"For batches of {asked.batch_size} instead of {asked.reference_batch_size} images:")
        for name in FOLLOWING:
            before, now = (reduce(getattr, name.split("."), c) for c in (asked, config))
            print(f"  {name:20} {before} → {now}" if before != now else f"  {name:20} {now}, as given")
    from pipelines import storage, train

    result = train.run(config)
    if result.status == "finished before":
        print(f"The run {config.name} has finished before: nothing was trained. Another --name starts a new one.")
    if result.resumed_from:
        print(f"Went on from step {result.resumed_from:,}.")
    for name, value in sorted(result.metrics.items()):
        print(f"  {name:24} {value:.4f}")
    for warning in result.warnings:
        print(f"Warning: {warning}")
    if result.status == "stopped":
        made = f"a checkpoint at step {result.steps:,} of {config.name}"
        cli.close(made, result.model, then=shlex.join(["boxinst", "train", *argv]))
        return 0
    if result.status == "finished" and not result.resumed_from:
        files = storage.list_files(result.model.rpartition("/")[0])
        kept = sum(file.size for name, file in files.items() if name.startswith("checkpoint_") and "/" in name)
        plan.compare("train", config, Outcome(result.seconds, kept, result.used))
    if result.best:
        print(f"The model of the best validation is kept in {result.best}.")
    model = result.version or result.model
    then = f"boxinst segment --model {model} --shards {config.shards}"
    cli.close(f"the model {model} in {result.steps:,} steps", result.model, then=then)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
