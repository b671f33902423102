"""What training changes, and one step of it; a step that is not finite changes no weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from boxinst.condinst import CondInst, Outputs
from boxinst.criterion import Criterion
from boxinst.errors import InputError
from boxinst.structures import Batch
from boxinst.tensors import load_strict
from pipelines.config import TrainConfig


@dataclass
class Learner:
    """What training changes, and a checkpoint holds."""

    model: nn.Module
    """The network, wrapped for distributed training where there are several workers."""
    average: torch.optim.swa_utils.AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    """Optimiser steps done."""

    @property
    def network(self) -> CondInst:
        """The bare network."""
        return unwrapped(self.model)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {
            "step": self.step,
            "model": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.random.get_rng_state(),
        }

    def restore(self, state: dict[str, Any], *, rank: int) -> None:
        """Inverse of ``state``. Learning rate and other options of the optimiser stay as they are: they may be new.

        Raises:
            InputError: the state is of a network with other tensors, or of an optimiser that ordered them otherwise.
        """
        self.step = state["step"]
        load_strict(self.network, state["model"], "checkpoint")
        self.average.load_state_dict(state["average"])
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": options})
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:  # the optimiser's fast path wants the parameter's memory order
                    moments[name] = torch.empty_like(parameter).copy_(moment)
                elif name != "step":  # a checkpoint has them by their position
                    value = f"a moment of {list(moment.shape)} for a tensor of {list(parameter.shape)}"
                    remedy = "Another version wrote it: train under another --name, with --init from this run's model."
                    raise InputError("checkpoint", value, remedy)
        self.schedule.load_state_dict({**state["schedule"], "base_lrs": self.schedule.base_lrs})
        for group, rate, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * factor(self.schedule.last_epoch)
        if rank == 0:  # the state is of rank 0; the others keep the seed they started from
            torch.random.set_rng_state(state["random"])


def unwrapped(model: nn.Module) -> CondInst:
    """The network itself: it is wrapped only where there are several workers."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model  # type: ignore[return-value]


def take_step(
    learner: Learner,
    criterion: Criterion,
    batch: Batch,
    config: TrainConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step; returns the loss terms and the length of the gradient, still on the device.

    Where the length is not finite, weights and moments stay as they were, on all ranks alike; running statistics that
    the forward pass has updated do not, so nothing may be kept after such a step.
    """
    with autocast():
        outputs = learner.model(batch.images, [t.boxes for t in batch.targets], batch.sizes)
        teacher = _teacher(learner, batch, config)
    terms = criterion(outputs, batch, learner.step, teacher)
    learner.optimizer.zero_grad(set_to_none=True)
    # A loss that is not finite makes every gradient so, whatever its derivative, and with it that of the other ranks:
    # the length alone then tells all ranks the same.
    loss = terms["loss"]
    (loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()
    norm = nn.utils.clip_grad_norm_(learner.model.parameters(), config.grad_clip or math.inf)
    # As torch.amp.GradScaler tells a fused optimiser to leave a step out: on the device, without waiting for it.
    learner.optimizer.found_inf = 1 - norm.isfinite().float()  # type: ignore[attr-defined]
    learner.optimizer.step()
    learner.schedule.step()
    learner.average.update_parameters(learner.network)
    learner.step += 1
    return {name: term.detach() for name, term in terms.items()}, norm


def _teacher(learner: Learner, batch: Batch, config: TrainConfig) -> Outputs | None:
    """What the average of the network says of the batch, in the second half of a run that has a mean teacher."""
    if not config.loss.teacher_weight or 2 * learner.step < config.steps:
        return None
    with torch.no_grad():
        average = learner.average.module.eval()
        outputs: Outputs = average(batch.images, [t.boxes for t in batch.targets], batch.sizes)
    return outputs
