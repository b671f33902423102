"""pipelines.optimization: decay where it belongs, rates that follow the step, an average that forgets its start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipelines.config import TrainConfig
from pipelines.optimization import make_average, make_optimizer, make_schedule, rate_factor

CONFIG = TrainConfig(shards="s", steps=100, lr_warmup_steps=10)


class Scaled(nn.Sequential):
    """A few layers and a number that is neither weight nor bias, as the scales of the dense head are."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("kind", "decaying"), [("adamw", ["0.weight"]), ("sgd", ["scale", "0.weight", "0.bias", "4.bias"])]
)
def test_normalisation_does_not_decay_and_biases_only_as_published(kind: str, decaying: list[str]) -> None:
    model = Scaled()
    model[4].weight.requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    decays, rests = make_optimizer(model, replace(CONFIG, optimizer=kind, weight_decay=0.3)).param_groups
    assert (decays["weight_decay"], rests["weight_decay"]) == (0.3, 0)
    assert [names[p] for p in decays["params"]] == decaying
    assert {names[p] for p in rests["params"]} == set(names.values()) - set(decaying) - {"4.weight"}


def test_the_rate_rises_and_falls_along_a_cosine() -> None:
    rates = [rate_factor(step, CONFIG) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_the_rate_falls_to_a_tenth_at_each_milestone() -> None:
    config = replace(CONFIG, schedule="step", milestones=(60, 80))
    assert [rate_factor(step, config) for step in (59, 60, 79, 80)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_the_schedule_sets_the_rate_of_the_optimiser() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), CONFIG)
    schedule = make_schedule(optimizer, CONFIG)
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(CONFIG.learning_rate * rate_factor(step, CONFIG))
        optimizer.step()
        schedule.step()


def averaged(decay: float, values: list[float]) -> float:
    model = nn.BatchNorm1d(1)
    average = make_average(model, decay)
    for value in values:
        model.running_mean.fill_(value)  # a buffer is averaged as a weight is
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    assert average.module.running_mean.item() == average.module.weight.item()
    return float(average.module.weight.item())


def test_the_average_starts_at_the_first_weights_and_forgets_them() -> None:
    assert averaged(0.999, [5]) == 5
    # The second update keeps 2/11 of the first: (1 + 1) / (10 + 1).
    assert averaged(0.999, [5, 0]) == pytest.approx(5 * 2 / 11)
    assert averaged(0.1, [5, 0]) == pytest.approx(0.5)
    assert averaged(0.999, [5] + [1] * 60) == pytest.approx(1, abs=1e-3)


def test_without_decay_the_average_is_the_last_weights() -> None:
    assert averaged(0, [5, 3, 7]) == 7
