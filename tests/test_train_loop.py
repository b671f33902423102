"""pipelines.train_loop: what a checkpoint holds is enough to go on exactly; means are written, and no infinite loss."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from boxinst.condinst import CondInst
from boxinst.config import LossConfig, ModelConfig
from boxinst.criterion import Criterion
from boxinst.errors import InputError
from boxinst.structures import Batch, Targets
from pipelines import checkpoint
from pipelines.config import TrainConfig
from pipelines.optimization import make_average, make_optimizer, make_schedule
from pipelines.train_loop import Job, Journal, Learner, _step

CONFIG = TrainConfig(
    shards="s",
    steps=6,
    lr_warmup_steps=2,
    model=ModelConfig(classes=("x",), backbone="resnet18", width=16, fpn_channels=16, mask_stride=4),
    loss=LossConfig(warmup_steps=3),
)


def learner(config: TrainConfig, seed: int) -> Learner:
    torch.manual_seed(seed)
    model = CondInst(config.model).train().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    return Learner(model, make_average(model, config.ema_decay), optimizer, make_schedule(optimizer, config))


def train(who: Learner, config: TrainConfig, stop: int) -> list[float]:
    """Steps up to ``stop``, on images that follow from the step alone; returns the losses."""
    criterion, losses = Criterion(config.model, config.loss), []
    while who.step < stop:
        generator = torch.Generator().manual_seed(who.step)
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
        targets = [Targets(torch.tensor([[8.0, 8, 40, 50]]), torch.tensor([0])) for _ in range(2)]
        batch = Batch(images, torch.ones(2, 64, 64, dtype=torch.bool), targets, [0, 1])
        terms, norm = _step(who, criterion, batch, config, nullcontext)
        assert norm > 0
        losses.append(float(terms["loss"]))
    return losses


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_restored_learner_goes_on_exactly(kind: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=kind)
    whole, broken = learner(config, seed=1), learner(config, seed=1)
    losses = train(whole, config, 6)
    assert train(broken, config, 3) == losses[:3]
    checkpoint.save(tmp_path, {"learner": broken.state()})
    drawn = torch.rand(3)

    resumed = learner(config, seed=2)
    resumed.restore(checkpoint.load(tmp_path)["learner"], rank=0)
    assert torch.equal(torch.rand(3), drawn)
    assert resumed.step == 3
    assert train(resumed, config, 6) == losses[3:]
    for part in ("model", "average"):
        for name, tensor in whole.state()[part].items():
            assert torch.equal(tensor, resumed.state()[part][name]), name
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()
    for parameter, moments in resumed.optimizer.state.items():
        for moment in moments.values():  # as before, or the optimiser would take its slow path
            assert moment.shape != parameter.shape or moment.stride() == parameter.stride()


def test_the_gradient_is_clipped() -> None:
    free, held = learner(CONFIG, 1), learner(CONFIG, 1)
    train(free, replace(CONFIG, grad_clip=0), 1)
    train(held, replace(CONFIG, grad_clip=1e-9, optimizer="sgd"), 1)
    length = torch.stack([p.grad.norm() for p in held.network.parameters() if p.grad is not None]).norm()
    unclipped = torch.stack([p.grad.norm() for p in free.network.parameters() if p.grad is not None]).norm()
    assert length <= 1.01e-9
    assert unclipped > 1e-3


class Recorder:
    """Stands for an MLflow run, and for the Control actor."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[str, float]] = {}
        self.show = self

    def remote(self, step: int, values: dict[str, float]) -> None:
        """``control.show.remote(...)``."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.entries[step] = values


def journal() -> tuple[Journal, Recorder]:
    recorder = Recorder()
    made = Journal(Job(CONFIG, "", None, None, "", "", recorder), rank=1, ranks=1)  # no run of its own
    made.run = recorder  # type: ignore[assignment]
    return made, recorder


def test_entries_are_means_since_the_last_one() -> None:
    book, recorder = journal()
    for step, loss in enumerate((1.0, 2.0, 6.0), 1):
        with book.waiting():
            pass
        book.add({"loss": torch.tensor(loss)}, torch.tensor(3.0), images=4)
        if step > 1:
            book.write(step, 0.5)
    assert recorder.entries[2]["train/loss"] == 1.5
    assert recorder.entries[3]["train/loss"] == 6
    assert recorder.entries[3]["train/grad_norm"] == 3
    assert recorder.entries[3]["train/learning_rate"] == 0.5
    assert recorder.entries[3]["train/images_per_second"] > 0
    assert 0 <= recorder.entries[2]["train/data_wait"] < 1


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    book, _ = journal()
    book.add({"loss": torch.tensor(float("nan"))}, torch.tensor(1.0), images=4)
    with pytest.raises(InputError) as caught:
        book.write(7, 0.5)
    assert (caught.value.item, "step 7" in str(caught.value.value)) == ("loss", True)
    assert "--learning-rate" in caught.value.remedy
