"""The training loss: boxes, masks and mixes of both; crops, empty batches and the warm-up."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from boxinst import Batch, CondInst, InputError, ModelConfig, Targets, losses, priors
from boxinst.colors import root_colors
from boxinst.condinst import Outputs
from boxinst.config import LossConfig
from boxinst.criterion import Criterion
from boxinst.dynamic import HeadShape, box_masks, dynamic_masks, upsample
from boxinst.fcos import Controllers, locations
from boxinst.prompts import prompt_coordinates

TINY = {"backbone": "resnet18", "width": 8, "fpn_channels": 16}
TINY |= {"mask_branch_channels": 8, "mask_branch_layers": 1, "dense_layers": 1}
CONFIG = ModelConfig(classes=("a", "b"), mask_stride=4, **TINY)
LOSS = LossConfig(warmup_steps=10)


@pytest.fixture(scope="module")
def model() -> CondInst:
    torch.manual_seed(0)
    return CondInst(CONFIG).eval()  # eval: batch statistics would couple the images of a batch


def targets(masks: str = "none", seed: int = 0) -> Targets:
    """Three boxes in a 64×64 image, with masks for none, some or all of them."""
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 8, 60, 50], [40, 40, 62, 63]])
    labels = torch.tensor([0, 1, 1])
    if masks == "none":
        return Targets(boxes, labels)
    g = torch.Generator().manual_seed(seed)
    truth = box_masks(boxes, (64, 64), 1) & (torch.rand(3, 64, 64, generator=g) > 0.3)
    has = torch.tensor([True, masks == "all", masks == "all"])
    return Targets(boxes, labels, truth & has[:, None, None], has)


def batch(*all_targets: Targets, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    count = len(all_targets)
    # Smooth images, so that there are colour edges above the threshold.
    coarse = torch.rand(count, 3, 8, 8, generator=g) * 255
    images = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").to(torch.uint8)
    valid = torch.ones(count, 64, 64, dtype=torch.bool)
    return Batch(images, valid, list(all_targets), list(range(count)))


def run(model: CondInst, data: Batch, loss: LossConfig = LOSS, step: int = 100) -> dict[str, torch.Tensor]:
    outputs = model(data.images, [t.boxes for t in data.targets], data.sizes)
    return Criterion(model.config, loss)(outputs, data, step)


def test_terms_add_up_and_every_parameter_gets_a_gradient(model):
    model.zero_grad()
    terms = run(model, batch(targets("some"), targets()))
    loss = terms.pop("loss")
    assert set(terms) == {
        *("projection", "pairwise", "dice", "detect_projection", "detect_pairwise", "detect_dice"),
        *("cls", "box", "centerness"),
    }
    torch.testing.assert_close(loss.detach(), sum(terms.values()))
    assert all(float(v) > 0 for v in terms.values())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", ["no boxes", "crowd", "cut", "tiny"])
def test_batches_without_usable_instances_train_on(model, kind):
    model.zero_grad()
    empty = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    one = torch.tensor([[3.0, 3, 40, 40]])
    data = {
        "no boxes": empty,
        "crowd": Targets(one, torch.tensor([0]), crowd=torch.tensor([True])),
        "cut": Targets(one, torch.tensor([0]), tight=torch.tensor([False])),
        "tiny": Targets(torch.tensor([[5.1, 5.1, 5.2, 5.2]]), torch.tensor([0])),
    }[kind]
    terms = run(model, batch(data, empty))
    assert bool(terms["loss"].isfinite())
    terms["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    if kind != "tiny":
        assert float(terms["projection"]) == 0
        assert float(terms["pairwise"]) == 0


DEGENERATE = {
    "of no size": [[20.0, 20, 20, 20], [10, 5, 10, 40], [0, 0, 0, 0], [64, 64, 64, 64]],
    "outside": [[100.0, 10, 140, 40], [-50, -50, -10, -10], [10, 64, 30, 90], [1e6, 1e6, 2e6, 2e6]],
    "partly outside": [[-100.0, -100, 200, 200], [50, 50, 90, 90]],
    "turned round": [[40.0, 40, 10, 10]],
    "without a positive location": [[5.1, 5.1, 5.2, 5.2], [17, 17, 20, 20]],
}
"""Boxes that shards do not hold, or that augmentation may leave."""


@pytest.fixture(scope="module", params=["prompt", "detect", "both"])
def learning(request):
    """A network in training and its optimiser, one after the other for all cases."""
    torch.manual_seed(0)
    config = replace(CONFIG, prompt=request.param != "detect", detect=request.param != "prompt")
    network = CondInst(config).train()
    return network, torch.optim.AdamW(network.parameters(), lr=1e-4)


@pytest.mark.parametrize("kind", [*DEGENERATE, "none"])
def test_degenerate_boxes_train_on_and_so_does_the_next_batch(learning, kind):
    network, optimizer = learning
    boxes = torch.tensor(DEGENERATE.get(kind, [])).reshape(-1, 4)
    labels = torch.arange(len(boxes)) % 2
    odd = Targets(boxes, labels)
    masked = Targets(boxes, labels, torch.zeros(len(boxes), 64, 64, dtype=torch.bool))
    empty = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    for data in (batch(odd, empty), batch(masked), batch(targets("some"), odd)):
        terms = run(network, data)
        assert all(bool(t.isfinite()) for t in terms.values()), terms
        optimizer.zero_grad()
        terms["loss"].backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
        optimizer.step()
    assert all(bool(p.grad.any()) for p in network.parameters())  # the last batch holds sound labels too


def test_prompt_terms_equal_the_whole_map(model):
    """With a margin as wide as the image the windows are the whole map, where the terms are those of the losses."""
    data = batch(targets("some"), targets())
    terms = run(model, data, LossConfig(warmup_steps=10, prompt_margin=10.0))
    with torch.no_grad():
        out = model(data.images, [t.boxes for t in data.targets], data.sizes)
    boxes = torch.cat([t.boxes for t in data.targets])
    points, scales = prompt_coordinates(boxes)
    index = [0, 0, 0, 1, 1, 1]
    coarse = dynamic_masks(out.mask_features, index, out.prompt, points, scales, head=HeadShape.of(CONFIG), stride=4)
    logits = upsample(coarse, 2)
    inside = box_masks(boxes, (32, 32), 2)
    by_box = torch.tensor([False, True, True, True, True, True])
    similarity = losses.color_similarity(data.images, data.valid, stride=2)
    pairwise = losses.pairwise_loss(logits[by_box], similarity, inside[by_box], image_index=torch.tensor(index)[by_box])
    truth = data.targets[0].masks[:1, 1::2, 1::2]
    torch.testing.assert_close(terms["projection"], losses.projection_loss(logits[by_box], inside[by_box]) * 5 / 6)
    torch.testing.assert_close(terms["pairwise"], pairwise * 5 / 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["dice"], losses.dice_loss(logits[:1], truth) / 6)


def test_the_order_of_instances_does_not_matter(model):
    t = targets("some")
    a = run(model, batch(t, targets()))
    b = run(model, batch(t[torch.tensor([2, 0, 1])], targets()))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def test_masks_that_are_not_labels_change_nothing(model):
    t = targets("some")
    assert t.masks is not None
    noisy = Targets(t.boxes, t.labels, t.masks.clone(), t.has_mask)
    noisy.masks[1:] = True  # type: ignore[index]
    for name, value in run(model, batch(t)).items():
        torch.testing.assert_close(run(model, batch(noisy))[name], value)


def test_full_supervision_uses_the_dice_alone(model):
    terms = run(model, batch(targets("all")))
    assert float(terms["projection"]) == 0
    assert float(terms["pairwise"]) == 0
    assert float(terms["dice"]) > 0


def test_mask_labels_weigh_as_much_as_they_are_told_to(model):
    data = batch(targets("some"), targets())
    plain, heavy = (run(model, data, LossConfig(warmup_steps=10, mask_weight=weight)) for weight in (1.0, 3.0))
    for name in set(plain) - {"loss"}:
        torch.testing.assert_close(heavy[name], plain[name] * (3 if "dice" in name else 1))
    torch.testing.assert_close(heavy["loss"], plain["loss"] + 2 * (plain["dice"] + plain["detect_dice"]))


def test_warmup_is_a_function_of_the_step(model):
    data = batch(targets())
    full = float(run(model, data, step=9)["pairwise"])
    assert float(run(model, data, step=4)["pairwise"]) == pytest.approx(full / 2, rel=1e-4)
    assert float(run(model, data, step=999)["pairwise"]) == pytest.approx(full, rel=1e-4)


def test_invalid_pixels_take_no_part_in_colour_edges(model):
    data = batch(targets())
    data.valid[:] = False
    assert float(run(model, data)["pairwise"]) == 0
    assert float(run(model, data)["projection"]) > 0


def prompt_logits(model: CondInst, data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits and boxes of all instances over the whole map, at the loss stride."""
    outputs = model(data.images, [t.boxes for t in data.targets], data.sizes)
    boxes = torch.cat([t.boxes for t in data.targets])
    index = [n for n, t in enumerate(data.targets) for _ in range(len(t))]
    points, scales = prompt_coordinates(boxes)
    maps = dynamic_masks(
        outputs.mask_features, index, outputs.prompt, points, scales, head=HeadShape.of(CONFIG), stride=4
    )
    return upsample(maps, 2), box_masks(boxes, (32, 32), 2)


def test_a_pixel_has_one_owner(model):
    # The second box holds part of the first; the third touches neither, nor do boxes of another image.
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 8, 60, 36], [40, 44, 62, 63]])
    data = batch(Targets(boxes, torch.tensor([0, 1, 1])), targets())
    config = LossConfig(warmup_steps=0, overlap_weight=3.0)
    got = run(model, data, config)["overlap"]
    logits, inside = prompt_logits(model, data)
    total, shared = 0.0, 0
    for members in (slice(0, 3), slice(3, 6)):
        claims = (logits[members].double().sigmoid() * inside[members]).detach()
        total += float(claims.sum() - claims.amax(0).sum())
        shared += int((inside[members].sum(0) > 1).sum())
    assert shared > 0
    assert float(got) == pytest.approx(3 * total / shared, rel=1e-3)
    model.zero_grad()


def test_a_range_of_fill_the_region_and_a_teacher_add_their_terms(model):
    data = batch(targets("some"), targets())
    config = LossConfig(warmup_steps=0, fill_range=(0.9, 0.95), fill_weight=2.0, teacher_weight=0.5)
    config = replace(config, region_weight=3.0)
    outputs = model(data.images, [t.boxes for t in data.targets], data.sizes)
    torch.manual_seed(5)
    other = CondInst(CONFIG).eval()
    teacher = other(data.images, [t.boxes for t in data.targets], data.sizes)
    terms = Criterion(CONFIG, config)(outputs, data, 100, teacher)
    (logits, inside), (guess, _) = prompt_logits(model, data), prompt_logits(other, data)
    by_box = torch.tensor([False, True, True, True, True, True])  # the first has a mask
    fill = (priors.fill_terms(logits, inside, (0.9, 0.95)) * by_box).sum() / 6 * 2
    torch.testing.assert_close(terms["fill"], fill.detach(), rtol=1e-4, atol=1e-5)
    # Over the whole map, but for cells that other boxes of the image hold.
    cells = [inside[k : k + 3].sum(0) for k in (0, 0, 0, 3, 3, 3)]
    colors = torch.cat([root_colors(data.images[n : n + 1], 2).expand(3, -1, -1, -1) for n in (0, 1)])
    grown = torch.cat([t.boxes for t in data.targets])
    margin = (grown[:, 2:] - grown[:, :2]).amax(1, keepdim=True) * priors.REGION_MARGIN
    near = box_masks(torch.cat([grown[:, :2] - margin, grown[:, 2:] + margin], 1), (32, 32), 2)
    alone = torch.stack(cells) <= inside
    region = (priors.region_terms(logits, colors, near & alone) * by_box).sum() / 6 * 3
    torch.testing.assert_close(terms["region"], region.detach(), rtol=1e-3, atol=1e-4)
    # The dice also sees the mask outside the box, of which windows hold a part.
    imitation = (priors.imitation_terms(logits, guess, inside) * by_box).sum() / 6 * 0.5
    assert float(terms["imitation"]) == pytest.approx(float(imitation.detach()), rel=0.2)
    alone = Criterion(CONFIG, config)(outputs, data, 100)
    assert float(alone["imitation"]) == 0


class BlockingCopies(TorchDispatchMode):
    """Notes what is copied between host and device while the host waits, with the line that did it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, devices = func.__name__, {x.device.type for x in (*args, out) if isinstance(x, Tensor)}
        # Numbers of the program become a tensor on the device (torch.tensor and the like), or a tensor moves.
        made = name.startswith("lift_fresh") and devices != {"cpu"}
        moved = name.startswith(("_to_copy", "copy_")) and len(devices) > 1
        if made or (moved and not (kwargs or {}).get("non_blocking")):
            self.found.append(name)
        return out


@pytest.mark.parametrize("masks", ["none", "some", "all"])
def test_the_loss_never_waits_for_the_device(model, masks):
    """Tensors of the meta device have no numbers: whatever must be known on the host fails there, as .item() does."""
    crowded = targets()
    crowded.crowd[1] = crowded.tight[2] = True
    data = batch(targets(masks), crowded, Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    outputs = model(data.images, [t.boxes for t in data.targets], data.sizes)

    def moved(x: Tensor) -> Tensor:
        return x.detach().to("meta").requires_grad_()

    dense = outputs.dense
    tensors = {f.name: getattr(dense, f.name) for f in fields(dense)}
    controllers = dense.controllers
    controllers = Controllers(
        [moved(x) for x in controllers.features], moved(controllers.weight), moved(controllers.bias)
    )
    dense = replace(
        dense, controllers=controllers, **{name: moved(x) for name, x in tensors.items() if isinstance(x, Tensor)}
    )
    outputs = Outputs(moved(outputs.mask_features), dense, moved(outputs.prompt))
    with BlockingCopies() as copies:
        data = data.to("meta")
        ours = replace(LOSS, region_weight=1.0, overlap_weight=1.0, fill_range=(0.5, 0.8))
        Criterion(CONFIG, ours)(outputs, data, 5)["loss"].backward()
    assert copies.found == []
    assert outputs.prompt.grad.shape == outputs.prompt.shape
    assert controllers.weight.grad.shape == controllers.weight.shape
    assert controllers.features[0].grad.shape == controllers.features[0].shape


def test_what_would_wait_for_the_device_is_found():
    x = torch.zeros(3, device="meta")
    for wait in (lambda: bool(x.any()), lambda: x[x > 0], lambda: x.cpu(), lambda: x.tolist(), lambda: x.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with BlockingCopies() as copies:
        torch.tensor([1.0], device="meta")
        x.new_tensor([1.0])
        torch.zeros(3).to("meta")
        torch.zeros(3).to("meta", non_blocking=True)
    assert len(copies.found) == 3


def test_empty_slots_change_nothing(model):
    """On a GPU there is a slot for every location that could be chosen; on a CPU those that are not are left out."""
    data = batch(targets("some"))
    out = model(data.images, None)
    places = locations(out.dense.grids, data.images.device)
    similarity = losses.color_similarity(data.images, data.valid, stride=2)
    instance = torch.full((len(places.points),), -1)
    instance[[3, 40, 41]] = torch.tensor([0, 1, 2])
    sums = [
        Criterion(CONFIG, LOSS)._detect_mask_sums(
            out.mask_features, out.dense, places, 0, data.targets[0], instance, torch.tensor(where), similarity
        )
        for where in ([3, 40, 41], [3, 40, 41, -1, -1], [-1])
    ]
    for name in ("projection", "dice", "pairwise", "edges", "boxes", "masks"):
        few, padded, none = (getattr(s, name) for s in sums)
        torch.testing.assert_close(few, padded)
        assert few > 0
        assert none == 0


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(1)
    model = CondInst(CONFIG).train()
    data = batch(targets("some"), targets())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(12):
        loss = run(model, data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.97 * history[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("color_threshold", 1.5),
        ("kernel_size", 4),
        ("dilation", 0),
        ("pairwise_weight", -1),
        ("mask_weight", -1),
        ("theta", 0),
        ("fill_range", (0.8, 0.2)),
        ("overlap_weight", -1),
        ("region_weight", -1),
    ],
)
def test_config_errors_name_the_option(field, value):
    with pytest.raises(InputError, match=f"loss.{field}"):
        LossConfig(**{field: value})
