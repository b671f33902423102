"""Optimiser, learning rate and moving average of a training run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from pipelines.config import TrainConfig

_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD. Normalisation does not decay, and in AdamW no bias does; in SGD biases do, as published.

    Fused: one kernel for all weights, which can be told on the device to leave a step out (``learner.take_step``).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = {p for m in model.modules() if isinstance(m, _NORMALISATION) for p in m.parameters(recurse=False)}
    if config.optimizer == "adamw":
        kept |= {p for p in parameters if p.ndim <= 1}
    groups = [
        {"params": [p for p in parameters if p not in kept], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p in kept], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """The learning rate, a pure function of the step."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, config))


def rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the highest learning rate at ``step`` (from 0): a linear rise, then a half cosine or stairs."""
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    if config.schedule == "step":
        return 0.1 ** bisect_right(config.milestones, step)
    length = max(config.steps - config.lr_warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - config.lr_warmup_steps) / length, 1)))


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """The moving average of weights and buffers, whose decay rises to ``decay`` so that it forgets the random start."""

    average: AveragedModel

    def update(averages: PARAM_LIST, values: PARAM_LIST, _: Tensor | int) -> None:
        # As in TensorFlow's ExponentialMovingAverage(num_updates=...). The counter kept on the CPU is read, as the
        # argument is a copy on the weights' device, which would have to be waited for.
        count = int(average.n_averaged)
        rising = min(decay, (1 + count) / (10 + count))
        get_ema_multi_avg_fn(rising)(averages, values, count)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average


def make_autocast(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A fresh context of the run's arithmetic at each call."""
    if config.precision == "bf16" or (config.precision == "auto" and bf16_pays(device)):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 is native on the device: measured on CPUs with avx512_bf16, a step takes 0.4 of the time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as file:
            return "avx512_bf16" in file.read()
    except OSError:
        return False
