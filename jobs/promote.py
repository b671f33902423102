"""Make a version the champion if it is no worse than the present one on an evaluation set; or go back to the last one.

  boxinst promote --name cells --shards shards/val --reason "first masks corrected by hand"
  boxinst promote --name cells --rollback

Ends with status 1 when the candidate is refused. `models:/NAME@champion` names the champion wherever a model is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import tyro

from boxinst.errors import InputError
from jobs import cli, options
from pipelines.config import EvaluateConfig
from pipelines.promotion import PromoteConfig

if TYPE_CHECKING:
    from pipelines import registry


@dataclass(frozen=True)
class Options(EvaluateConfig, PromoteConfig):
    """Which version to promote, and how to score it."""

    model: Annotated[str, tyro.conf.Suppress] = ""  # the candidate's, then the champion's
    shards: str = ""
    """Evaluation shards, the same for candidate and champion. Not needed for --rollback."""

    def __post_init__(self) -> None:
        PromoteConfig.__post_init__(self)
        EvaluateConfig.__post_init__(self)
        if not (self.shards or self.rollback):
            raise InputError("--shards", "not given", "Give labelled shards that the model was not trained on.")


def main(argv: Sequence[str]) -> int:
    """Promote, or go back, as ``argv`` asks; 1 when the candidate is refused."""
    config = options.parse(Options, argv, command="promote", about=__doc__)
    from pipelines import registry

    result = registry.rollback(config) if config.rollback else decide(config)
    print(result.table)
    address = f"models:/{config.name}@{config.alias}"
    if not result.promoted:
        print(f"\nRefused: {result.version.label} is worse than the {config.alias}, which stays. Nothing was changed.")
        return 1
    cli.close(
        f"{result.version.label} the {config.alias}", address, then=f"boxinst segment --model {address} --shards ..."
    )
    return 0


def decide(config: Options) -> registry.PromoteResult:
    """Score candidate and champion on the same shards, and let the gate decide."""
    from pipelines import evaluate, registry, storage

    storage.check(config.shards)
    candidate, champion = registry.contenders(config)
    for version in filter(None, (candidate, champion)):  # both, before the first is scored
        registry.resolve(version.uri)
    shards = storage.read_manifest(config.shards, "shards")
    scores = [evaluate.run(replace(config, model=v.uri)) for v in (candidate, champion) if v]
    on = f"{config.shards} ({shards.hash})"
    return registry.promote(config, scores[0], scores[1] if champion else None, evaluated_on=on)


if __name__ == "__main__":
    sys.exit(cli.main(["promote", *sys.argv[1:]]))
