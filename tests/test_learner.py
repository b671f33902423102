"""pipelines.learner: a checkpoint is enough to go on exactly; what is not finite changes no weight, on any rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from boxinst.condinst import CondInst
from boxinst.config import LossConfig, ModelConfig
from boxinst.criterion import Criterion
from boxinst.errors import InputError
from boxinst.structures import Batch, Targets
from pipelines import checkpoint
from pipelines.config import TrainConfig
from pipelines.journal import Journal
from pipelines.learner import Learner, take_step, unwrapped
from pipelines.optimization import make_average, make_optimizer, make_schedule

CONFIG = TrainConfig(
    shards="s",
    steps=6,
    lr_warmup_steps=2,
    model=ModelConfig(classes=("x",), backbone="resnet18", width=16, fpn_channels=16, mask_stride=4),
    loss=LossConfig(warmup_steps=3),
)
NAN = float("nan")


def learner(config: TrainConfig, seed: int = 1) -> Learner:
    torch.manual_seed(seed)
    model = CondInst(config.model).train().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    return Learner(model, make_average(model, config.ema_decay), optimizer, make_schedule(optimizer, config))


def batch(seed: int, *boxes: list[list[float]], side: int = 64) -> Batch:
    """Images of noise with the given boxes each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(boxes), 3, side, side), dtype=torch.uint8, generator=generator)
    targets = [
        Targets(torch.tensor(b, dtype=torch.float32).reshape(-1, 4), torch.zeros(len(b), dtype=torch.int64))
        for b in boxes
    ]
    ids = [100 * seed + k for k in range(len(boxes))]
    return Batch(images, torch.ones(len(boxes), side, side, dtype=torch.bool), targets, ids)


BOX = [8.0, 8, 40, 50]


def train(who: Learner, config: TrainConfig, stop: int) -> list[float]:
    """Steps up to ``stop``, on images that follow from the step alone; returns the losses."""
    criterion, losses = Criterion(config.model, config.loss), []
    while who.step < stop:
        terms, norm = take_step(who, criterion, batch(who.step, [BOX], [BOX]), config, nullcontext)
        assert norm > 0
        losses.append(float(terms["loss"]))
    return losses


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_restored_learner_goes_on_exactly(kind: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=kind)
    whole, broken = learner(config), learner(config)
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


def test_a_restored_learner_follows_a_new_rate_and_an_old_state_without_a_fused_optimiser() -> None:
    before = learner(CONFIG)
    train(before, CONFIG, 3)
    state = before.state()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    slower = replace(CONFIG, learning_rate=CONFIG.learning_rate / 4)
    resumed = learner(slower)
    resumed.restore(state, rank=0)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(before.optimizer.param_groups[0]["lr"] / 4)
    rate = resumed.optimizer.param_groups[1]["lr"]
    train(resumed, slower, 4)
    train(before, CONFIG, 4)
    assert 0 < resumed.optimizer.param_groups[1]["lr"] < rate
    assert resumed.schedule.get_last_lr()[0] == pytest.approx(before.schedule.get_last_lr()[0] / 4)


def test_a_state_of_another_network_names_both_sizes() -> None:
    state = learner(CONFIG).state()
    other = learner(replace(CONFIG, model=replace(CONFIG.model, classes=("x", "y"))))
    with pytest.raises(InputError, match=r"class_logits\.bias is \[1\], the model has \[2\].*model\.classes"):
        other.restore(state, rank=0)


def test_moments_in_another_order_are_refused() -> None:
    """A checkpoint has them by their position."""
    config = replace(CONFIG, optimizer="sgd")
    who = learner(config)
    train(who, config, 2)
    state = who.state()
    moments = state["optimizer"]["state"]
    state["optimizer"]["state"] = dict(zip(moments, reversed(moments.values()), strict=True))
    with pytest.raises(InputError, match=r"checkpoint: a moment of \[.*another --name"):
        learner(config).restore(state, rank=0)


def test_the_gradient_is_clipped() -> None:
    free, held = learner(CONFIG, 1), learner(CONFIG, 1)
    train(free, replace(CONFIG, grad_clip=0), 1)
    train(held, replace(CONFIG, grad_clip=1e-9, optimizer="sgd"), 1)
    length = torch.stack([p.grad.norm() for p in held.network.parameters() if p.grad is not None]).norm()
    unclipped = torch.stack([p.grad.norm() for p in free.network.parameters() if p.grad is not None]).norm()
    assert length <= 1.01e-9
    assert unclipped > 1e-3


# Half precision.


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("in_all", [0, 500])
@pytest.mark.parametrize("labels", ["boxes", "masks"])
@pytest.mark.parametrize("heads", [("detect",), ("prompt",), ("detect", "prompt")], ids="+".join)
def test_a_step_in_half_precision_is_near_one_in_full(heads: tuple[str, ...], labels: str, in_all: int) -> None:
    model = replace(CONFIG.model, detect="detect" in heads, prompt="prompt" in heads)
    extras = {"region_weight": 1, "overlap_weight": 1, "fill_range": (0.5, 0.8)}
    loss = replace(CONFIG.loss, warmup_steps=0, max_positives_in_all=in_all, **extras)
    config = replace(CONFIG, model=model, loss=loss, grad_clip=0)
    # Torch's convolution of a single cell has no gradient to be relied on in bfloat16 on a CPU.
    data = batch(5, [BOX, [20.0, 16, 60, 44]], [BOX], side=128)
    if labels == "masks":
        masks = torch.zeros(2, 128, 128, dtype=torch.bool)
        masks[0, 12:46, 12:36] = True
        first, second = data.targets
        first = Targets(first.boxes, first.labels, masks, torch.tensor([True, False]))
        data = Batch(data.images, data.valid, [first, second], data.image_ids)
    figures, gradients = [], []
    for autocast in (nullcontext, bf16):
        who = learner(config)
        terms, norm = take_step(who, Criterion(model, loss), data, config, autocast)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in who.network.parameters())
        figures.append({name: float(term) for name, term in terms.items()})
        gradients.append(float(norm))
    assert figures[1] == pytest.approx(figures[0], rel=0.03, abs=1e-3)
    assert gradients[1] == pytest.approx(gradients[0], rel=0.2)


# What is not finite.


def kept(who: Learner) -> dict[str, Tensor]:
    """Weights, averaged weights and moments of the optimiser, as they are now."""
    moments = [m for state in who.optimizer.state.values() for m in state.values()]
    average = list(who.average.module.parameters())
    return {str(k): t.detach().clone() for k, t in enumerate([*who.network.parameters(), *average, *moments])}


def unchanged(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    return before.keys() == now.keys() and all(torch.equal(t, now[k]) for k, t in before.items())


class Infinite(Criterion):
    """A loss that is infinite and yet has a finite derivative."""

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        terms = super().__call__(*args)
        return {**terms, "loss": terms["loss"] + torch.inf}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("case", ["loss", "terms"])
def test_a_step_that_is_not_finite_moves_nothing(kind: Any, case: str) -> None:
    config = replace(CONFIG, optimizer=kind, weight_decay=0.1, ema_decay=0)
    who = learner(config)
    train(who, config, 2)
    before = kept(who)
    criterion = (Infinite if case == "loss" else Criterion)(config.model, config.loss)
    data = batch(7, [BOX], [[8.0, NAN, 40, 50] if case == "terms" else BOX])
    terms, norm = take_step(who, criterion, data, config, nullcontext)
    assert not terms["loss"].isfinite()
    assert not norm.isfinite()
    assert unchanged(before, kept(who))
    # Each step is judged anew.
    fresh = learner(config)
    fresh.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    before = kept(fresh)
    train(fresh, config, 1)
    assert not unchanged(before, kept(fresh))


# Two ranks, one of which has no instance, and then one of which has a broken box.

IMAGES: list[list[list[float]]] = [[BOX, [4.0, 4, 30, 30]], []]


def _flat(who: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in who.network.parameters() if p.grad is not None])


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    who = learner(CONFIG)
    who.model = DistributedDataParallel(who.network.eval())  # eval: batch statistics are each rank's own
    criterion = Criterion(CONFIG.model, CONFIG.loss)
    whole = batch(3, *IMAGES)
    mine = Batch(whole.images[rank, None], whole.valid[rank, None], [whole.targets[rank]], [whole.image_ids[rank]])
    sound = take_step(who, criterion, mine, replace(CONFIG, grad_clip=0), nullcontext)
    assert all(p.grad is not None for p in who.network.parameters())
    gradient, before = _flat(who), kept(who)

    journal = Journal(CONFIG, None, None, dist.group.WORLD)
    journal.add(1, *sound, mine.image_ids)
    assert journal.broken_step() is None
    for step in (2, 3):  # rank 1 alone has a box that is none
        data = batch(10 * step + rank, [[8.0, NAN, 40, 50] if rank == 1 and step == 2 else BOX])
        journal.add(step, *take_step(who, criterion, data, CONFIG, nullcontext), data.image_ids)
        if step == 2:
            assert unchanged(before, kept(who))
    found = journal.broken_step()
    assert found is not None
    step, shares = found
    said = [(s.rank, s.image_ids, sorted(s.broken)) for s in shares]
    torch.save({"gradient": gradient, "step": step, "said": said}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_stay_in_step_where_one_has_no_instance_or_a_broken_one(tmp_path: Path) -> None:
    set_forkserver_preload(["torch", "torchvision"])  # once for both, as it takes seconds
    mp.start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="forkserver")  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["gradient"], second["gradient"])
    alone = learner(CONFIG)
    alone.network.eval()
    take_step(alone, Criterion(CONFIG.model, CONFIG.loss), batch(3, *IMAGES), replace(CONFIG, grad_clip=0), nullcontext)
    # Both ranks' sums are divided by the mean count, so that DDP's mean of gradients is that of all images together.
    torch.testing.assert_close(first["gradient"], _flat(alone), rtol=1e-3, atol=1e-5)

    for told in (first, second):
        assert told["step"] == 2
        (_, good_ids, nothing), (_, bad_ids, terms) = told["said"]
        assert (good_ids, nothing, bad_ids) == ([2000], [], [2100])
        assert {"loss", "projection"} <= set(terms)
    assert unwrapped(alone.model) is alone.model
