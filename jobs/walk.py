"""The whole path on one corpus, step by step, by the very commands that a user would type."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from boxinst.errors import InputError
from jobs import options, promote, reviewer
from jobs.report import Step
from pipelines import cluster, evaluate, feedback, registry, review, segment, selection, shards, storage, train
from pipelines.schema import Manifest
from pipelines.synthetic import SyntheticCorpus

Config = TypeVar("Config")
Result = TypeVar("Result")

STEPS = 9


@dataclass
class Walk:
    """One walk along the path: what it starts from, where its parts go, and its steps so far."""

    name: str
    """Of the run, the registered model and the review."""
    recipe: str
    folder: Path
    """Where shards, masks, the next corpus and the report go."""
    corpus: SyntheticCorpus
    train_words: Sequence[str] = ()
    """More options for ``train``."""
    steps: list[Step] = field(default_factory=list)

    def at(self, *parts: str) -> str:
        """A place below the walk's folder."""
        return near(self.folder.joinpath(*parts))

    def command(
        self,
        name: str,
        words: Sequence[str],
        config_class: type[Config],
        run: Callable[[Config], Result],
        say: Callable[[Result], str],
    ) -> Result:
        """Run one command: show it, do it, say what came of it, and keep its time."""
        words = [*(["--recipe", self.recipe] if name in options.SECTIONS else []), *words]
        config = options.parse(config_class, words, command=name, about=None)
        return self.step(name, shlex.join(["boxinst", name, *words]), lambda: run(config), say)

    def step(self, name: str, shown: str, run: Callable[[], Result], say: Callable[[Result], str]) -> Result:
        """As ``command``, for what is no command of its own."""
        print(f"\n[{len(self.steps) + 1}/{STEPS}] {shown}", flush=True)
        begin = time.monotonic()
        result = run()
        self.steps.append(Step(name, say(result), time.monotonic() - begin, shown))
        print(f"      {self.steps[-1].result} ({self.steps[-1].seconds:.1f} s)", flush=True)
        return result


@dataclass
class Outcome:
    """What a walk came to."""

    shards: Manifest
    """Of the training images."""
    val: Manifest
    figures: dict[str, float]
    """On the validation images."""
    trained: train.TrainResult
    masks: Manifest
    verdicts: Counter[str]
    corpus: feedback.Feedback
    """The next one."""
    champion: registry.Version


def near(path: Path) -> str:
    """``path`` as one would type it: relative where it lies below the working directory."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def find_corpus(folder: str) -> SyntheticCorpus:
    """The parts of a corpus laid out as ``images/`` and ``annotations/instances_{train,val}.json``.

    The model learns from ``instances_train_boxes.json`` where there is one, so that it cannot see a mask.

    Raises:
        InputError: a part is missing.
    """
    root = Path(folder)
    found = {}
    for split in ("train", "val"):
        whole, twin = (root / "annotations" / f"instances_{split}{ending}.json" for ending in ("", "_boxes"))
        found[split], found[f"{split}_boxes"] = (
            str(whole if whole.exists() else twin),
            str(twin if twin.exists() else whole),
        )
    for path in (str(root / "images"), *found.values()):
        if not Path(path).exists():
            remedy = "Give a folder with images/, annotations/instances_train.json and annotations/instances_val.json."
            raise InputError("--corpus", f"{path} does not exist", remedy)
    return SyntheticCorpus(images=str(root / "images"), **found)


def go(walk: Walk) -> Outcome:
    """Walk the whole path; what an earlier walk of this name has finished is not done again."""
    cluster.start()
    made, val = (_shard(walk, *split) for split in (("train", walk.corpus.train_boxes), ("val", walk.corpus.val)))
    trained = walk.command(
        "train",
        [
            "--shards",
            walk.at("shards", "train"),
            "--val",
            walk.at("shards", "val"),
            "--name",
            walk.name,
            *walk.train_words,
        ],
        train.TrainConfig,
        _train,
        lambda r: " ".join(
            [
                f"{r.version}, {r.steps:,} steps" + (", trained before" if r.status == "finished before" else ""),
                *(f"Warning: {warning}" for warning in r.warnings),
            ]
        ),
    )
    figures = walk.command(
        "evaluate",
        ["--model", trained.version, "--shards", walk.at("shards", "val")],
        evaluate.EvaluateConfig,
        evaluate.run,
        lambda f: ", ".join(f"{key} {f[key]:.3f}" for key in ("mask_iou", "mask_ap", "box_iou") if key in f),
    )
    masks = walk.command(
        "segment",
        ["--model", trained.version, "--shards", walk.at("shards", "train"), "--out", walk.at("masks")],
        segment.SegmentConfig,
        segment.run,
        lambda m: f"{m.counts['ok']:,} masks for {m.counts['boxes']:,} boxes",
    )
    verdicts = _review(walk, masks)
    corpus = walk.command(
        "feedback",
        ["--dataset", walk.name, "--out", walk.at("next.json"), "--overwrite"],
        feedback.FeedbackConfig,
        feedback.run,
        lambda f: f"{f.boxes:,} boxes, {f.masks:,} of them with a mask now",
    )
    return Outcome(made, val, figures, trained, masks, verdicts, corpus, _promote(walk, trained.version))


def _shard(walk: Walk, split: str, annotations: str) -> Manifest:
    return walk.command(
        "shard",
        ["--annotations", annotations, "--images", walk.corpus.images, "--out", walk.at("shards", split)],
        shards.ShardConfig,
        shards.run,
        lambda m: (
            f"{m.counts['images']:,} images, {m.counts['boxes']:,} boxes, "
            f"{m.counts['rejected_images'] + m.counts['rejected_boxes']:,} rejected"
        ),
    )


def _train(config: train.TrainConfig) -> train.TrainResult:
    result = train.run(config)
    if result.status == "stopped":
        raise KeyboardInterrupt  # the checkpoint is kept, and the next walk goes on from it
    return result


def _review(walk: Walk, masks: Manifest) -> Counter[str]:
    """Fill the review and give verdicts in a reviewer's stead."""
    config = options.parse(
        review.ReviewConfig,
        words := ["--masks", walk.at("masks"), "--shards", walk.at("shards", "train"), "--dataset", walk.name],
        command="review",
        about=None,
    )
    walk.command("review", words, review.ReviewConfig, review.run, lambda r: f"{r.boxes:,} masks to look at")
    ids = selection.select(config.masks, masks, limit=config.limit, audit=config.audit, seed=config.seed).ids

    def judge() -> Counter[str]:
        said = reviewer.verdicts(storage.shard_files(config.masks, masks), walk.corpus.train)
        chosen = {int(annotation): said[int(annotation)] for annotation in ids}
        review.tag(walk.name, chosen)
        return Counter(chosen.values())

    shown = "a simulated reviewer: verdicts by IoU with the truth, or by consistency where there is none"
    return walk.step(
        "verdicts", shown, judge, lambda c: ", ".join(f"{c[v]:,} {v}" for v in ("accept", "fix", "reject"))
    )


def _promote(walk: Walk, version: str) -> registry.Version:
    moves = registry.history(walk.name)
    words = ["--name", walk.name, "--candidate", version, "--shards", walk.at("shards", "val"), "--reason", "demo"]

    def run(config: promote.Options) -> registry.Version:
        candidate = registry.find(version)
        return candidate if moves and moves[-1].version == candidate.version else promote.decide(config).version

    return walk.command("promote", words, promote.Options, run, lambda v: f"models:/{walk.name}@champion is {v.label}")
