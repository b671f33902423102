"""Every choice of every stage, with its meaning and bounds. Imports nothing heavy: a command line is read at once."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from boxinst.config import AugmentConfig, LossConfig, ModelConfig
from boxinst.errors import InputError
from pipelines import settings


@dataclass(frozen=True)
class ShardConfig:
    """What to turn into shards."""

    annotations: str
    """COCO JSON file: a local path or s3://."""
    images: str
    """Folder or s3:// prefix below which the JSON's file names are found."""
    out: str | None = None
    """Output folder or s3:// prefix; BOXINST_STORE/shards/<name of the JSON file> when not given."""
    target_mb: int = 128
    """Image bytes of a shard in megabytes. Smaller shards spread a small corpus over more workers."""
    exif: Literal["stored", "applied"] = "stored"
    """Whether the boxes refer to the pixels as stored in the files, or as turned by their EXIF orientation."""
    overwrite: bool = False
    """Replace shards of other inputs or options in the output folder."""

    def __post_init__(self) -> None:
        if self.target_mb < 1:
            raise InputError("--target-mb", self.target_mb, "Give 1 or more.")
        if self.exif not in ("stored", "applied"):
            raise InputError("--exif", self.exif, "Give stored or applied.")

    @property
    def output(self) -> str:
        """Where the shards go."""
        return self.out or f"{settings.store()}/shards/{PurePosixPath(self.annotations).stem}"


@dataclass(frozen=True)
class CutConfig:
    """What to cut, and into how large pieces."""

    annotations: str
    """COCO JSON file: a local path or s3://. It may be of any length."""
    out: str | None = None
    """Output folder or s3:// prefix; BOXINST_STORE/pieces/<name of the JSON file> when not given."""
    images_per_piece: int = 1_000_000
    """Images of a piece. Fewer where images have many boxes: `shard` takes 1 GiB of memory for a million boxes."""
    overwrite: bool = False
    """Replace pieces of another file or size in the output folder."""

    def __post_init__(self) -> None:
        if self.images_per_piece < 1:
            raise InputError("--images-per-piece", self.images_per_piece, "Give 1 or more.")

    @property
    def output(self) -> str:
        """Where the pieces go."""
        return self.out or f"{settings.store()}/pieces/{PurePosixPath(self.annotations).stem}"


MAY_CHANGE = (
    "val",
    "workers",
    "workers_min",
    "gpu",
    "cpus_per_worker",
    "data_workers",
    "precision",
    "log_every",
    "eval_every",
    "eval_max_images",
    "checkpoint_every",
    "num_to_keep",
    "max_failures",
    "minutes",
    "register",
    "learning_rate",
    "grad_clip",
)
"""Options that a resumed run may change: they decide where and how fast it runs and what is written down; and the
length of a step, so that a run that got lost can go on from its last checkpoint with shorter ones."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on shards, track it in MLflow and register it. The same command again resumes."""

    shards: str
    """Folder of the shards to train on, from `boxinst shard`."""
    val: str = ""
    """Folder of the validation shards, with the same classes. Empty for no validation."""
    name: str = "boxinst"
    """Name of the run, of its MLflow experiment and of the registered model. A run is resumed by its name."""
    init: str = ""
    """Model to fine-tune from: a folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID. Its network is taken
    over, so leave the options of `model` alone."""
    init_classes: Literal["same", "new"] = "same"
    """Whether the initial model must have the classes of the shards, or gets a new classifier for them and keeps all
    the rest. `new` to start from a model of other classes, such as an imported one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights and constants of the losses."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What is done to the training images. Its contrast stretch is the model's."""
    mask_labels: Literal["use", "ignore"] = "use"
    """Whether mask labels in the training shards are used where there are any, or every instance is trained by its box
    alone. Validation uses them in either case."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW for networks from random weights, SGD as published for pretrained ones."""
    learning_rate: float = 1e-3
    """Highest learning rate, for the whole batch. Change it in proportion to the batch size."""
    weight_decay: float = 1e-4
    """Weight decay of the convolutions and matrices; normalisation and biases have none."""
    momentum: float = 0.9
    """Momentum of SGD."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls: along a half cosine to 0, or to a tenth at each milestone."""
    milestones: tuple[int, ...] = ()
    """Optimiser steps at which the rate falls to a tenth, for the step schedule."""
    lr_warmup_steps: int = 50
    """Steps over which the learning rate rises from 0 to its highest. 1000 for long runs with SGD."""
    steps: int = 0
    """Optimiser steps in all. Give this or `epochs`."""
    epochs: float = 0
    """Passes over the shards in all, turned into steps. Give this or `steps`."""
    batch_size: int = 4
    """Images in a step, over all workers."""
    reference_batch_size: int = 0
    """The batch size that a recipe's rate, steps, milestones and warm-ups are meant for. Where the command's batch size
    is another, those that are not given on the command line follow it (linear rule). 0 leaves them as they are."""
    grad_clip: float = 10.0
    """Longest gradient (L2 norm over all parameters); a longer one is scaled down. 0 for no limit."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights, which is what is validated and kept. It remembers about
    1 / (1 - decay) steps; early on it is lower, so that short runs forget their start. 0 keeps the last weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network's layers. auto takes bf16 on GPUs and on CPUs with avx512_bf16 where it is faster."""
    channels_last: bool = True
    """Keep convolution weights in channels-last order, the faster one on most devices."""
    workers: int = 1
    """Training processes (Ray Train workers), one per GPU when `gpu` is on."""
    workers_min: int = 0
    """Start, and go on, with as few as this when nodes are missing, and with up to `workers` when they come. A step
    always takes `batch_size` images, so every number in between must divide it. 0 waits for all workers."""
    gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = 0
    """CPU slots and threads of each worker. 0 takes one slot, and as many threads as its share of the machine's
    cores."""
    data_workers: int = 0
    """Most processes that decode and augment at once. 0 for a quarter of the cores where the training shares them, and
    for every free CPU slot on GPUs or a cluster. More when `data_wait` in MLflow is high."""
    seed: int = 0
    """The same seed gives the same initial weights, order of images and augmentation."""
    log_every: int = 20
    """Steps between two entries of loss, learning rate and speed in MLflow."""
    eval_every: int = 0
    """Steps between two validations; 0 for one at the end."""
    eval_max_images: int = 200
    """Validate on at most this many images, spread evenly over the shards. `boxinst evaluate` uses all."""
    checkpoint_every: int = 500
    """Steps between two checkpoints. There is always one at the end."""
    num_to_keep: int = 2
    """Latest checkpoints that are kept."""
    max_failures: int = 2
    """How often training goes on from its last checkpoint by itself after a worker has died."""
    minutes: float = 0
    """Stop after this long and keep a checkpoint; the same command goes on from there. 0 for no limit."""
    register: bool = True
    """Register the finished model in MLflow under `name`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise InputError("--name", repr(self.name), "Use letters, digits, '_', '-' and '.' only.")
        for name in ("learning_rate", "batch_size", "workers", "log_every", "checkpoint_every", "num_to_keep"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give a positive number.")
        for name in (
            "weight_decay",
            "lr_warmup_steps",
            "reference_batch_size",
            "steps",
            "epochs",
            "grad_clip",
            "cpus_per_worker",
            "workers_min",
            "data_workers",
            "seed",
            "eval_every",
            "eval_max_images",
            "max_failures",
            "minutes",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give 0 or more.")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give a number from 0 to below 1.")
        if bool(self.steps) == bool(self.epochs):
            given = f"{self.steps} and --epochs {self.epochs:g}"
            raise InputError("--steps", given, "Give one of the two, above 0.")
        if self.workers_min > self.workers:
            raise InputError("--workers-min", self.workers_min, f"Give at most --workers ({self.workers}), or 0.")
        if self.batch_size % self.batch_parts:
            remedy = f"Give a multiple of --workers ({self.workers})."
            if self.batch_parts > self.workers:
                remedy = (
                    f"Give a multiple of {self.batch_parts}, for any of {self.workers_min} to {self.workers} workers."
                )
            raise InputError("--batch-size", self.batch_size, remedy)
        if (self.schedule == "step") != bool(self.milestones):
            remedy = "Give milestones with `--schedule step`, and only with it."
            raise InputError("--milestones", f"{self.milestones} with schedule {self.schedule}", remedy)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise InputError("--milestones", self.milestones, "Give them in rising order.")
        if self.loss.bottom_pixels and (self.augment.crop or self.augment.vflip):
            remedy = "Set it to 0, or augment.crop to 0 and augment.vflip off, so that the bottom stays the bottom."
            raise InputError("--loss.bottom-pixels", self.loss.bottom_pixels, remedy)
        stretch = self.augment.contrast_stretch
        if stretch not in (None, self.model.contrast_stretch):
            remedy = "Set --model.contrast-stretch alone: training and inference both follow it."
            raise InputError("--augment.contrast-stretch", stretch, remedy)

    @property
    def batch_parts(self) -> int:
        """The parts that a batch is cut into so that any number of workers that may be there can share it."""
        return math.lcm(*range(self.workers_min or self.workers, self.workers + 1))


FOLLOWING = ("learning_rate", "steps", "milestones", "lr_warmup_steps", "loss.warmup_steps")
"""What follows the batch size."""


def linear_rule(asked: TrainConfig, meant: TrainConfig) -> dict[str, Any]:
    """The values of ``FOLLOWING`` for another batch size than the one they are meant for.

    The rate is in proportion to the batch size, and the counts of steps are such that as many images pass (arXiv
    1706.02677, section 2.1).

    Args:
        asked: the config as asked for; its batch size and reference count.
        meant: the recipe's values, before any option of the command line.

    Returns:
        Values by name, as in a recipe; empty where nothing has to follow.
    """
    if asked.reference_batch_size in (0, asked.batch_size):
        return {}
    ratio = asked.batch_size / asked.reference_batch_size

    def steps(count: int) -> int:
        return max(1, round(count / ratio)) if count else 0

    return {
        "learning_rate": meant.learning_rate * ratio,
        "steps": steps(meant.steps),
        "milestones": tuple(map(steps, meant.milestones)),
        "lr_warmup_steps": steps(meant.lr_warmup_steps),
        "loss": {"warmup_steps": steps(meant.loss.warmup_steps)},
        "reference_batch_size": asked.batch_size,
    }


@dataclass(frozen=True)
class Resolution:
    """The size that images have in the network. Masks always come back in the pixels of the image as stored."""

    short_side: int
    """The shorter side in pixels; 0 leaves images as they are."""
    max_side: int
    """Upper bound of the longer side, where ``short_side`` is given."""

    def __post_init__(self) -> None:
        if self.short_side < 0:
            raise InputError("--short-side", self.short_side, "Give a side in pixels, or 0 for the images as they are.")
        if self.max_side < max(self.short_side, 1):
            raise InputError("--max-side", self.max_side, f"Give at least the short side, {self.short_side} pixels.")


Mode = Literal["prompt", "detect"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Which model to score on which shards."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID, or a folder that training wrote."""
    shards: str
    """Folder or s3:// prefix that `boxinst shard` wrote. Where it has no mask labels, boxes alone are scored."""
    mode: Mode = "prompt"
    """`prompt`: one mask for every given box. `detect`: no boxes given, the model finds the objects."""
    max_detections: int = 100
    """The best objects of an image, per class, that count for AP; in detect mode no more are kept of an image, of all
    classes together. 100 is COCO's; raise it where images hold more."""
    score_threshold: float = 0.05
    """Least class probability × centre-ness of a detection, in detect mode, as published. Its root is the score that is
    reported."""
    short_side: int = 0
    """Resize images in the network to this shorter side; 0 leaves them as they are. Use the size that the model was
    trained at. Masks are compared in the pixels of the images as stored, whatever the size."""
    max_side: int = 1333
    """Upper bound of the longer side, where `--short-side` is given."""
    baselines: bool = True
    """In prompt mode, score the filled box and the inscribed ellipse too, where there are mask labels."""
    workers: int = 1
    """Processes with a copy of the model each. On one machine they share its cores, so 1 is as fast as more."""
    gpu: bool = False
    """Run each worker on a GPU of its own."""
    batch_size: int = 4
    """Images that a worker takes at a time."""
    max_images: int = 0
    """Score at most this many images, spread evenly over the shards and the same each time; 0 for all. AP takes memory
    for every object scored, so give some 10,000 where there are millions of boxes."""
    experiment: str = ""
    """Record the figures as a run of this MLflow experiment; empty records nothing."""

    def __post_init__(self) -> None:
        for name in ("max_detections", "workers", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give 1 or more.")
        if self.max_images < 0:
            raise InputError("--max-images", self.max_images, "Give 0 or more.")
        if self.mode not in ("prompt", "detect"):
            raise InputError("--mode", self.mode, "Give prompt or detect.")
        if not 0 <= self.score_threshold <= 1:
            raise InputError("--score-threshold", self.score_threshold, "Give a number from 0 to 1.")
        Resolution(self.short_side, self.max_side)


@dataclass(frozen=True)
class SegmentConfig:
    """Which boxes to turn into masks, and by which model."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID, or a folder that training wrote."""
    shards: str
    """Folder or s3:// prefix that `boxinst shard` wrote."""
    out: str | None = None
    """Output folder or s3:// prefix; BOXINST_STORE/masks/<name of the shards' folder> when not given."""
    coco: str | None = None
    """Also write COCO results JSON to this file: one entry for every box, with its annotation_id."""
    short_side: int = 0
    """Resize images in the network to this shorter side; 0 leaves them as they are. Use the size that the model was
    trained at. Masks come in the pixels of the images as stored, whatever the size."""
    max_side: int = 1333
    """Upper bound of the longer side, where `--short-side` is given."""
    workers: int = 1
    """Processes with a copy of the model each. On one machine they share its cores, so 1 is as fast as more."""
    gpu: bool = False
    """Run each worker on a GPU of its own."""
    batch_size: int = 4
    """Images that a worker takes at a time."""
    checkpoint_images: int = 64
    """Images after which results are written down. A worker has two such lots in hand, which a killed run repeats."""
    overwrite: bool = False
    """Replace what the output folder holds of other inputs or options."""

    def __post_init__(self) -> None:
        for name in ("workers", "batch_size", "checkpoint_images"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give 1 or more.")
        Resolution(self.short_side, self.max_side)

    @property
    def output(self) -> str:
        """Where the mask rows go."""
        shards = self.shards if self.shards.startswith("s3://") else os.path.abspath(self.shards)  # "." has no name
        return self.out or f"{settings.store()}/masks/{PurePosixPath(shards).name}"


@dataclass(frozen=True)
class ReviewConfig:
    """What to review, and how much of it."""

    masks: str
    """Mask rows from `boxinst segment`: a folder or s3:// prefix."""
    shards: str
    """The shards they were made from, which hold the images: a folder or s3:// prefix."""
    dataset: str = "review"
    """Name of the FiftyOne dataset. The same name goes on with the same review; other shards need another name."""
    limit: int = 5000
    """Review at most so many boxes, the least consistent masks first; 0 takes all. A reviewer judges a few thousand a
    day, and writing takes some minutes per 100,000."""
    audit: int = 200
    """Review so many boxes more, drawn at random from all: their verdicts tell how good the masks are on the whole."""
    seed: int = 0
    """Of the random sample."""
    app: bool = False
    """Open FiftyOne's App and wait until Ctrl-C."""
    port: int = 5151
    """Where the App listens."""
    address: str = "127.0.0.1"
    """Network interface of the App. It has no log-in: whoever reaches another address than this one can change all."""

    def __post_init__(self) -> None:
        if not self.dataset.strip():
            raise InputError("--dataset", repr(self.dataset), "Give a name.")
        for name in ("limit", "audit"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name}", getattr(self, name), "Give 0 or more.")
        if not 1 <= self.port <= 65535:
            raise InputError("--port", self.port, "Give a number between 1 and 65535.")


@dataclass(frozen=True)
class FeedbackConfig:
    """Which review to turn into which corpus."""

    out: str
    """COCO JSON file to write: a local path or s3://. Its file names are those of the corpus that was reviewed, so
    `boxinst shard` takes it with the same --images and --exif."""
    dataset: str = "review"
    """Name of the review, as given to `boxinst review`."""
    shards: str | None = None
    """The shards that were reviewed, where they have moved since."""
    drop_deleted: bool = False
    """Leave out the boxes whose label was deleted in the App. By default they stay, as boxes: a mask can be deleted by
    mistake, and the box was given by somebody."""
    overwrite: bool = False
    """Replace the output file."""

    def __post_init__(self) -> None:
        if not self.out.endswith(".json"):
            raise InputError("--out", self.out, "Give the path of a .json file.")
