"""The shipped recipes: every section builds its command's config, and every value says when to change it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from boxinst.dynamic import HeadShape
from boxinst.errors import InputError
from jobs import cli, options
from pipelines.config import TrainConfig, linear_rule

CONFIGS = {
    "shard": ("pipelines.shards", "ShardConfig", "--annotations a.json --images i"),
    "train": ("pipelines.config", "TrainConfig", "--shards s"),
    "evaluate": ("pipelines.evaluate", "EvaluateConfig", "--model m --shards s"),
    "segment": ("pipelines.segment", "SegmentConfig", "--model m --shards s"),
    "promote": ("jobs.promote", "Options", "--name m --shards s"),
}
"""Section → its config and the options that have no default."""


@pytest.mark.parametrize("section", CONFIGS)
@pytest.mark.parametrize("recipe", options.recipe_names())
def test_every_section_builds_its_config(recipe: str, section: str) -> None:
    module, name, required = CONFIGS[section]
    config_class = getattr(importlib.import_module(module), name)
    words = required.split()
    if section == "train" and not options.recipe_section(recipe, "train"):
        words += ["--steps", "1"]
    assert options.parse(config_class, ["--recipe", recipe, *words], command=section, about=None)


@pytest.mark.parametrize("recipe", options.recipe_names())
def test_every_value_says_when_to_change_it(recipe: str) -> None:
    lines = (options.RECIPES / f"{recipe}.yaml").read_text().splitlines()
    assert lines[0].startswith("# "), "a recipe opens with what it is for"
    bare = [line for line in lines if re.match(r"\s+\w+: ", line) and "#" not in line]
    assert bare == []
    assert all(len(line) <= 120 for line in lines)


PUBLISHED = {
    "coco_r50_1x": ("resnet50", 90_000, (60_000, 80_000), "30.7"),
    "coco_r50_3x": ("resnet50", 270_000, (210_000, 250_000), "31.8"),
    "coco_r101_1x": ("resnet101", 90_000, (60_000, 80_000), "32.2"),
    "coco_r101_3x": ("resnet101", 270_000, (210_000, 250_000), "33.0"),
    "condinst_r50_1x": ("resnet50", 90_000, (60_000, 80_000), "35.7"),
    "condinst_r50_3x": ("resnet50", 270_000, (210_000, 250_000), "37.5"),
    "condinst_r101_3x": ("resnet101", 270_000, (210_000, 250_000), "38.6"),
}
"""Recipe → its backbone, steps, milestones, and mask AP as published."""


def test_the_recipes_that_were_promised_are_shipped() -> None:
    assert options.recipe_names() == sorted([*PUBLISHED, "demo", "nuclei"])
    docs = Path(__file__).parent.parent / "docs" / "recipes.md"
    for name, (*_, ap) in PUBLISHED.items():
        assert f"{ap} mask AP" in (options.RECIPES / f"{name}.yaml").read_text()
        assert any(f"`{name}`" in line and ap in line for line in docs.read_text().splitlines())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_recipes_are_the_published_schedules(recipe: str) -> None:
    config = options.parse(TrainConfig, ["--recipe", recipe, "--shards", "s"], command="train", about=None)
    backbone, steps, milestones, _ = PUBLISHED[recipe]
    from_masks = recipe.startswith("condinst")
    assert (config.model.backbone, config.model.width, config.model.fpn_channels) == (backbone, 64, 256)
    assert (config.model.mask_stride, config.model.detect, config.model.prompt) == (8, True, True)
    assert (config.model.mask_channels, config.model.frozen_stages) == (8 if from_masks else 16, 2)
    assert HeadShape.of(config.model).num_parameters == (169 if from_masks else 233)
    assert (config.steps, config.milestones, config.schedule) == (steps, milestones, "step")
    assert (config.batch_size, config.optimizer, config.learning_rate) == (16, "sgd", 0.01)
    assert (config.momentum, config.weight_decay, config.lr_warmup_steps, config.grad_clip) == (0.9, 1e-4, 1000, 0)
    assert (config.loss.warmup_steps, config.loss.bottom_pixels, config.loss.color_threshold) == (10_000, 10, 0.3)
    assert (config.loss.max_positives, config.loss.max_positives_in_all) == (64, 500 if from_masks else 0)
    assert config.mask_labels == ("use" if from_masks else "ignore")
    assert config.augment.short_sides == (640, 672, 704, 736, 768, 800)
    assert config.augment.max_side == 1333


def test_rate_and_steps_follow_the_batch_size(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    words = ["--recipe", "coco_r50_1x", "--shards", "s", "--workers", "4", "--batch-size", "8"]
    _, config = options.parse_following(TrainConfig, words, command="train", about=None, follow=linear_rule)
    assert (config.batch_size, config.reference_batch_size) == (8, 8)
    assert (config.learning_rate, config.steps, config.milestones) == (0.005, 180_000, (120_000, 160_000))
    assert (config.lr_warmup_steps, config.loss.warmup_steps, config.loss.bottom_pixels) == (2000, 20_000, 10)
    # What is given is taken as it is, and the rest follows all the same.
    words += ["--learning-rate", "0.01", "--loss.warmup-steps", "7"]
    asked, config = options.parse_following(TrainConfig, words, command="train", about=None, follow=linear_rule)
    assert (config.learning_rate, config.loss.warmup_steps, config.steps) == (0.01, 7, 180_000)
    assert linear_rule(config, config) == {}
    # It is said by the command, which is stopped here before it trains.
    ran: list[TrainConfig] = []

    def run(config: TrainConfig) -> Any:
        ran.append(config)
        raise InputError("here", "stopped", "It is enough.")

    monkeypatch.setitem(sys.modules, "pipelines.train", SimpleNamespace(run=run))
    monkeypatch.setattr("pipelines.train", SimpleNamespace(run=run), raising=False)
    assert cli.main(["train", *words]) == 2
    assert ran == [config]
    shown = capsys.readouterr().out
    assert "batches of 8 instead of 16 images" in shown
    assert "90000 → 180000" in shown
    assert "(60000, 80000) → (120000, 160000)" in shown
    assert "learning_rate        0.01, as given" in shown
    # Without a reference, or at it, nothing follows.
    for words in (
        ["--recipe", "coco_r50_1x", "--shards", "s"],
        ["--recipe", "nuclei", "--shards", "s", "--batch-size", "9"],
    ):
        asked, config = options.parse_following(TrainConfig, words, command="train", about=None, follow=linear_rule)
        assert asked is config


def test_nuclei_learns_from_boxes_at_full_resolution() -> None:
    config = options.parse(TrainConfig, ["--recipe", "nuclei", "--shards", "s"], command="train", about=None)
    assert config.model.loss_stride == 1
    assert config.model.contrast_stretch == (0.5, 99.8)
    assert config.model.backbone_weights == "", "random weights: no download, no licence to think of"
