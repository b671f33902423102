"""Every choice of a training run, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from boxinst.condinst import ModelConfig
from boxinst.criterion import LossConfig
from boxinst.errors import InputError
from boxinst.transforms import AugmentConfig

MAY_CHANGE = (
    "val",
    "workers",
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
)
"""Options that a resumed run may change: they decide where and how fast it runs and what is written down."""


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
    gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = 0
    """CPU slots and threads of each worker. 0 takes one slot, and as many threads as its share of the machine's
    cores."""
    data_workers: int = 0
    """Most processes that decode and augment at once; 0 for as many as there are free CPU slots."""
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
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give a positive number.")
        for name in (
            "weight_decay",
            "lr_warmup_steps",
            "steps",
            "epochs",
            "grad_clip",
            "cpus_per_worker",
            "data_workers",
            "seed",
            "eval_every",
            "eval_max_images",
            "max_failures",
            "minutes",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give 0 or more.")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "Give a number from 0 to below 1.")
        if bool(self.steps) == bool(self.epochs):
            given = f"{self.steps} and --epochs {self.epochs:g}"
            raise InputError("--steps", given, "Give one of the two, above 0.")
        if self.batch_size % self.workers:
            remedy = f"Give a multiple of --workers ({self.workers})."
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
