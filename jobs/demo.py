"""Walk the whole path at once: shard, train, evaluate, segment, review, verdicts, feedback, promote; and report.

  boxinst demo                                     a drawn corpus, a few minutes on two cores
  boxinst demo --corpus FOLDER --recipe nuclei     yours: images/, annotations/instances_{train,val}.json

Run it again and it says what was done already; what was stopped goes on.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from boxinst.errors import InputError
from jobs import cli, options
from pipelines import settings


@dataclass(frozen=True)
class DemoConfig:
    """What to walk through."""

    corpus: str = ""
    """Folder or s3:// prefix with images/ and annotations/instances_{train,val}.json; empty draws a small corpus."""
    recipe: str = "demo"
    """Recipe of every step: demo, nuclei, or a YAML file of your own."""
    name: str = ""
    """Name of the run, the model and the review; by default the corpus folder's, or "shapes"."""
    steps: int = 0
    """Training steps, where the recipe's are too many."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError("--steps", self.steps, "Give 0 (the recipe's) or more.")


def main(argv: Sequence[str]) -> int:
    """Walk as ``argv`` asks."""
    config = options.parse(DemoConfig, argv, command="demo", about=__doc__)
    from jobs import findings, walk
    from pipelines import storage, synthetic, tracking

    name = config.name or (PurePosixPath(storage.absolute(config.corpus)).name if config.corpus else "shapes")
    folder = storage.join(settings.store(), "demo", name)
    storage.check(config.corpus, folder, tracking.artifacts(name))
    drawn = settings.home() / "demo" / name / "corpus"
    if not config.corpus and not (drawn / "annotations" / "instances_val_boxes.json").exists():  # the last one written
        synthetic.write(synthetic.SyntheticConfig(out=str(drawn)))
    corpus = walk.find_corpus(config.corpus or walk.near(str(drawn)))
    steps = ["--steps", str(config.steps)] if config.steps else []
    path = walk.Walk(name, config.recipe, folder, corpus, steps)
    outcome = walk.go(path)
    storage.write_bytes(path.at("report.html"), findings.report(path, outcome).html().encode())
    print(f"\n{findings.table(path, outcome)}")
    review = ["boxinst", "review", "--masks", path.at("masks"), "--shards", path.at("shards", "train")]
    cli.close("a report", path.at("report.html"), then=shlex.join([*review, "--dataset", name, "--app"]))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
