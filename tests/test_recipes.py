"""The shipped recipes: every section builds its command's config, and every value says when to change it."""

from __future__ import annotations

import importlib
import re

import pytest

from jobs import options

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


def test_the_recipes_that_were_promised_are_shipped() -> None:
    assert options.recipe_names() == ["coco_r101_3x", "coco_r50_1x", "coco_r50_3x", "demo", "nuclei"]


@pytest.mark.parametrize(
    ("recipe", "backbone", "steps", "milestones"),
    [
        ("coco_r50_1x", "resnet50", 90_000, (60_000, 80_000)),
        ("coco_r50_3x", "resnet50", 270_000, (210_000, 250_000)),
        ("coco_r101_3x", "resnet101", 270_000, (210_000, 250_000)),
    ],
)
def test_coco_recipes_are_the_published_schedules(
    recipe: str, backbone: str, steps: int, milestones: tuple[int, int]
) -> None:
    from pipelines.config import TrainConfig

    config = options.parse(TrainConfig, ["--recipe", recipe, "--shards", "s"], command="train", about=None)
    assert (config.model.backbone, config.model.width, config.model.fpn_channels) == (backbone, 64, 256)
    assert (config.model.mask_stride, config.model.detect, config.model.prompt) == (8, True, True)
    assert (config.steps, config.milestones, config.schedule) == (steps, milestones, "step")
    assert (config.batch_size, config.optimizer, config.learning_rate) == (16, "sgd", 0.01)
    assert (config.loss.warmup_steps, config.loss.bottom_pixels, config.loss.color_threshold) == (10_000, 10, 0.3)
    assert (min(config.augment.short_sides), max(config.augment.short_sides)) == (640, 800)
    assert config.augment.max_side == 1333


def test_nuclei_learns_from_boxes_at_full_resolution() -> None:
    from pipelines.config import TrainConfig

    config = options.parse(TrainConfig, ["--recipe", "nuclei", "--shards", "s"], command="train", about=None)
    assert config.model.loss_stride == 1
    assert config.model.contrast_stretch == (0.5, 99.8)
    assert config.model.backbone_weights == "", "random weights: no download, no licence to think of"
