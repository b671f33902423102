"""The published network and its losses in float64, written from their equations, one instance at a time.

It takes a state dict of AdelaiDet's names and shares no code with the package: convolutions and normalisation are
torch's, everything else is spelled out.

BoxInst: arXiv 2012.02310; CondInst: 2003.05664; FCOS: 1904.01355.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
SIZES = (64, 128, 256, 512, 1024)
BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def random_state(
    *, backbone: str = "resnet50", width: int = 4, fpn: int = 64, branch: int = 8, channels: int = 16, head: int = 8,
    classes: int = 5, towers: int = 4, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """A random checkpoint of AdelaiDet's names, float32, at whose outputs every branch is awake."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True, gain: float = 1.0) -> None:
        fan = inputs * kernel * kernel
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=g) * gain * math.sqrt(2 / fan)
        if bias:
            state[f"{name}.bias"] = torch.randn(outputs, generator=g) * 0.1

    def norm(name: str, size: int, *, statistics: bool = True, counter: bool = False) -> None:
        state[f"{name}.weight"] = 0.7 + torch.rand(size, generator=g) * 0.6
        state[f"{name}.bias"] = torch.randn(size, generator=g) * 0.2
        if statistics:
            state[f"{name}.running_mean"] = torch.randn(size, generator=g) * 0.2
            state[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=g)
        if counter:
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    up = "backbone.bottom_up."
    conv(f"{up}stem.conv1", width, 3, 7, bias=False, gain=0.02)
    norm(f"{up}stem.conv1.norm", width)
    inputs = width
    for stage, count in zip((2, 3, 4, 5), BLOCKS[backbone], strict=True):
        inner, outputs = width * 2 ** (stage - 2), width * 2**stage
        for block in range(count):
            at = f"{up}res{stage}.{block}."
            if block == 0:
                conv(f"{at}shortcut", outputs, inputs, 1, bias=False)
                norm(f"{at}shortcut.norm", outputs)
            for k, (o, i, kernel) in enumerate([(inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1)], 1):
                conv(f"{at}conv{k}", o, i, kernel, bias=False, gain=0.3 if k == 3 else 1.0)
                norm(f"{at}conv{k}.norm", o)
            inputs = outputs
        if stage > 2:
            conv(f"backbone.fpn_lateral{stage}", fpn, outputs, 1)
            conv(f"backbone.fpn_output{stage}", fpn, fpn, 3)
    conv("backbone.top_block.p6", fpn, fpn, 3)
    conv("backbone.top_block.p7", fpn, fpn, 3)
    dense = "proposal_generator.fcos_head."
    for tower in ("cls_tower", "bbox_tower"):
        for k in range(towers):
            conv(f"{dense}{tower}.{3 * k}", fpn, fpn, 3)
            norm(f"{dense}{tower}.{3 * k + 1}", fpn, statistics=False)
    conv(f"{dense}cls_logits", classes, fpn, 3)
    conv(f"{dense}bbox_pred", 4, fpn, 3)
    state[f"{dense}bbox_pred.bias"] += 2.0
    conv(f"{dense}ctrness", 1, fpn, 3)
    for k in range(5):
        state[f"{dense}scales.{k}.scale"] = torch.rand(1, generator=g) + 0.5
    for k in range(3):
        conv(f"mask_branch.refine.{k}.0", branch, fpn, 3, bias=False)
        norm(f"mask_branch.refine.{k}.1", branch, counter=True)
    for k in range(4):
        conv(f"mask_branch.tower.{k}.0", branch, branch, 3, bias=False)
        norm(f"mask_branch.tower.{k}.1", branch, counter=True)
    conv("mask_branch.tower.4", channels, branch, 1)
    conv("controller", (channels + 2) * head + head * head + head + 2 * head + 1, fpn, 3, gain=0.15)
    state["mask_head.sizes_of_interest"] = torch.tensor(SIZES)
    state["mask_head._iter"] = torch.tensor([90_000.0])
    return state


class Reference:
    """The published network on a state dict of AdelaiDet's names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.p = {k: v.double() for k, v in state.items()}
        self.fcos = "proposal_generator.fcos_head."

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.p[f"{name}.weight"]
        return F.conv2d(x, weight, self.p.get(f"{name}.bias"), stride=stride, padding=weight.shape[-1] // 2)

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (self.p[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        return (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None] * weight[:, None, None] + bias[
            :, None, None
        ]

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        n, c, h, w = x.shape
        groups = x.reshape(n, 32, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(n, c, h, w)
        return x * self.p[f"{name}.weight"][:, None, None] + self.p[f"{name}.bias"][:, None, None]

    def features(self, image: Tensor) -> dict[int, Tensor]:
        """uint8 RGB [3, h, w] → P3 to P7. The network sees BGR less its mean, padded with 0 to multiples of 32."""
        x = image.flip(0).double() - torch.tensor([103.53, 116.28, 123.675]).double()[:, None, None]
        h, w = x.shape[1:]
        x = F.pad(x, (0, -w % 32, 0, -h % 32))[None]
        up = "backbone.bottom_up."
        x = self.batch_norm(self.conv(x, f"{up}stem.conv1", 2), f"{up}stem.conv1.norm").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        trunk = {}
        for stage in (2, 3, 4, 5):
            block = 0
            while f"{up}res{stage}.{block}.conv1.weight" in self.p:
                at, stride = f"{up}res{stage}.{block}.", 2 if block == 0 and stage > 2 else 1
                skip = x
                if block == 0:
                    skip = self.batch_norm(self.conv(x, f"{at}shortcut", stride), f"{at}shortcut.norm")
                y = self.batch_norm(self.conv(x, f"{at}conv1", stride), f"{at}conv1.norm").relu()  # stride in the 1×1
                y = self.batch_norm(self.conv(y, f"{at}conv2"), f"{at}conv2.norm").relu()
                x = (self.batch_norm(self.conv(y, f"{at}conv3"), f"{at}conv3.norm") + skip).relu()
                block += 1
            trunk[stage] = x
        p: dict[int, Tensor] = {}
        above = None
        for level in (5, 4, 3):
            x = self.conv(trunk[level], f"backbone.fpn_lateral{level}")
            if above is not None:
                x = x + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
            p[level], above = self.conv(x, f"backbone.fpn_output{level}"), x
        p[6] = self.conv(p[5], "backbone.top_block.p6", 2)
        p[7] = self.conv(p[6].relu(), "backbone.top_block.p7", 2)
        return p

    def mask_features(self, p: dict[int, Tensor]) -> Tensor:
        """→ [C, h, w] at stride 8."""
        x = torch.zeros(1)
        for k, level in enumerate((3, 4, 5)):
            y = self.batch_norm(self.conv(p[level], f"mask_branch.refine.{k}.0"), f"mask_branch.refine.{k}.1").relu()
            x = x + aligned(y[0], 2**k)[None]
        for k in range(4):
            x = self.batch_norm(self.conv(x, f"mask_branch.tower.{k}.0"), f"mask_branch.tower.{k}.1").relu()
        return self.conv(x, "mask_branch.tower.4")[0]

    def dense(self, p: dict[int, Tensor]) -> list[dict[str, Any]]:
        """Every location of one image: level, point, class probabilities, centre-ness, distances, parameters."""
        out = []
        for k, stride in enumerate(STRIDES):
            towers = {}
            for tower in ("cls_tower", "bbox_tower"):
                x, i = p[k + 3], 0
                while f"{self.fcos}{tower}.{3 * i}.weight" in self.p:
                    x = self.group_norm(
                        self.conv(x, f"{self.fcos}{tower}.{3 * i}"), f"{self.fcos}{tower}.{3 * i + 1}"
                    ).relu()
                    i += 1
                towers[tower] = x
            classes = self.conv(towers["cls_tower"], f"{self.fcos}cls_logits")[0]
            center = self.conv(towers["bbox_tower"], f"{self.fcos}ctrness")[0, 0]
            scale = self.p[f"{self.fcos}scales.{k}.scale"]
            distances = (self.conv(towers["bbox_tower"], f"{self.fcos}bbox_pred")[0] * scale).relu()
            parameters = self.conv(towers["bbox_tower"], "controller")[0]
            for i in range(classes.shape[1]):
                for j in range(classes.shape[2]):
                    out.append(
                        {
                            "level": k,
                            "x": j * stride + stride // 2,
                            "y": i * stride + stride // 2,
                            "classes": classes[:, i, j],
                            "center": center[i, j],
                            "distances": distances[:, i, j],
                            "parameters": parameters[:, i, j],
                        }
                    )
        return out

    def mask_logits(self, features: Tensor, location: dict[str, Any]) -> Tensor:
        """[C, h, w] → logits [2h, 2w] at stride 4 of the instance at a location."""
        c, h, w = features.shape
        theta, n = location["parameters"], 8
        size = SIZES[location["level"]]
        x = (location["x"] - (torch.arange(w).double() * 8 + 4)) / size
        y = (location["y"] - (torch.arange(h).double() * 8 + 4)) / size
        inputs = torch.cat([x.expand(h, w)[None], y[:, None].expand(h, w)[None], features]).reshape(c + 2, -1)
        w1, w2, w3, b1, b2, b3 = theta.split([(c + 2) * n, n * n, n, n, n, 1])
        z = (w1.reshape(n, c + 2) @ inputs + b1[:, None]).relu()
        z = (w2.reshape(n, n) @ z + b2[:, None]).relu()
        z = w3.reshape(1, n) @ z + b3[:, None]
        return aligned(z.reshape(1, h, w), 2)[0]

    def detect(self, image: Tensor, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Boxes, scores, labels, mask probabilities and masks at (height, width), best first."""
        h, w = image.shape[1:]
        p = self.features(image)
        features = self.mask_features(p)
        candidates = []
        for k, stride in enumerate(STRIDES):
            level = []
            for place in (q for q in self.dense(p) if q["level"] == k):
                quality = place["classes"].sigmoid() * place["center"].sigmoid()
                for label in range(len(quality)):
                    if quality[label] > 0.05:
                        left, top, right, bottom = (place["distances"] * stride).tolist()
                        box = (place["x"] - left, place["y"] - top, place["x"] + right, place["y"] + bottom)
                        level.append((math.sqrt(quality[label]), label, box, place))
            candidates += sorted(level, key=lambda c: -c[0])[:1000]
        kept: list[Any] = []
        for c in sorted(candidates, key=lambda c: -c[0]):
            if all(c[1] != other[1] or iou(c[2], other[2]) <= 0.6 for other in kept):
                kept.append(c)
        rows, columns = size or (h, w)
        found: dict[str, list[Any]] = {"boxes": [], "scores": [], "labels": [], "probabilities": [], "logits": []}
        for score, label, box, place in kept[:100]:
            sx, sy = columns / w, rows / h
            x0, x1 = (min(max(v * sx, 0), columns) for v in (box[0], box[2]))
            y0, y1 = (min(max(v * sy, 0), rows) for v in (box[1], box[3]))
            if x1 <= x0 or y1 <= y0:
                continue
            logits = self.mask_logits(features, place)
            fine = aligned(logits.sigmoid()[None], 4)[:, :h, :w]
            if size is not None:
                fine = F.interpolate(fine[None], size, mode="bilinear", align_corners=False)[0]
            values = ([x0, y0, x1, y1], score, label, fine[0], logits)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
        return {
            k: torch.stack(v) if isinstance(v[0], Tensor) else torch.as_tensor(np.array(v)) for k, v in found.items()
        }


def aligned(maps: Tensor, f: int) -> Tensor:
    """[C, h, w] → [C, f·h, f·w]: output j from the source at (j − ⌊f/2⌋) / f, clamped to the map, linearly."""
    for axis in (1, 2):
        length = maps.shape[axis]
        position = ((torch.arange(f * length).double() - f // 2) / f).clamp(0, length - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1)
        part = (position - low).reshape(-1, 1) if axis == 1 else position - low
        maps = maps.index_select(axis, low) * (1 - part) + maps.index_select(axis, high) * part
    return maps


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / total if total else 0.0


# Losses.


def assigned(
    dense: list[dict[str, Any]], boxes: list[list[float]], centers: list[tuple[float, float]]
) -> list[tuple[int, int]]:
    """(location, box) of the positive locations of one image."""
    out = []
    for index, place in enumerate(dense):
        low, high = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))[place["level"]]
        reach = 1.5 * STRIDES[place["level"]]
        best, best_area = -1, math.inf
        for k, ((x0, y0, x1, y1), (cx, cy)) in enumerate(zip(boxes, centers, strict=True)):
            x, y = place["x"], place["y"]
            region = (max(cx - reach, x0), max(cy - reach, y0), min(cx + reach, x1), min(cy + reach, y1))
            near = region[0] < x < region[2] and region[1] < y < region[3]
            largest = max(x - x0, y - y0, x1 - x, y1 - y)
            if near and low <= largest <= high and (x1 - x0) * (y1 - y0) < best_area:
                best, best_area = k, (x1 - x0) * (y1 - y0)
        if best >= 0:
            out.append((index, best))
    return out


def losses(
    reference: Reference,
    images: list[Tensor],
    boxes: list[list[list[float]]],
    labels: list[list[int]],
    masks: list[Tensor] | None,
    *,
    bottom: int = 0,
    iteration: int = 10_000,
) -> dict[str, float]:
    """The terms of the published loss over images of one padded size; masks [n, H, W] make it CondInst's.

    Args:
        reference: the network; its normalisation keeps its statistics.
        images: uint8 RGB.
        boxes: xyxy of each image.
        labels: of each image.
        masks: of each image, at its size; None trains from boxes.
        bottom: rows at the bottom that take no part in colour edges.
        iteration: from 1.
    """
    focal = giou = center = weights = 0.0
    positives = instances = edges = 0
    projection = pairwise = dice = 0.0
    for n, image in enumerate(images):
        h, w = image.shape[1:]
        height, width = h + -h % 32, w + -w % 32
        p = reference.features(image)
        features, dense = reference.mask_features(p), reference.dense(p)
        drawn = torch.zeros(len(boxes[n]), height, width).double()
        for k, (x0, y0, x1, y1) in enumerate(boxes[n]):
            drawn[k, int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1
        if masks is not None:
            drawn = F.pad(masks[n].double(), (0, width - w, 0, height - h))
        rows, columns = torch.arange(height).double(), torch.arange(width).double()
        centers = [
            (float((m.sum(0) * columns).sum() / m.sum()), float((m.sum(1) * rows).sum() / m.sum())) for m in drawn
        ]
        matches = assigned(dense, boxes[n], centers)
        owner = dict(matches)
        for index, place in enumerate(dense):
            for c, logit in enumerate(place["classes"]):
                q = float(logit.sigmoid())
                if index in owner and labels[n][owner[index]] == c:
                    focal -= 0.25 * (1 - q) ** 2 * math.log(q)
                else:
                    focal -= 0.75 * q**2 * math.log(1 - q)
        for index, k in matches:
            place, (x0, y0, x1, y1) = dense[index], boxes[n][k]
            s = STRIDES[place["level"]]
            truth = [(place["x"] - x0) / s, (place["y"] - y0) / s, (x1 - place["x"]) / s, (y1 - place["y"]) / s]
            left, top, right, under = truth
            flat, steep = min(left, right) / max(left, right), min(top, under) / max(top, under)
            weight = math.sqrt(flat * steep)
            guess = place["distances"].tolist()
            near, far = (
                [min(u, v) for u, v in zip(guess, truth, strict=True)],
                [max(u, v) for u, v in zip(guess, truth, strict=True)],
            )

            def area(d: list[float]) -> float:
                return (d[0] + d[2]) * (d[1] + d[3])

            union = area(guess) + area(truth) - area(near)
            value = (area(near) + 1) / (union + 1) - (area(far) - union) / area(far)
            giou += weight * (1 - value)
            weights += weight
            q = float(place["center"].sigmoid())
            center -= weight * math.log(q) + (1 - weight) * math.log(1 - q)
            positives += 1
        # At most max(⌊64 / g⌋, 1) locations of each of g objects, by the best class × centre-ness.
        chosen = []
        found = sorted({k for _, k in matches})
        for k in found:
            mine = [dense[index] for index, owned in matches if owned == k]
            mine.sort(key=lambda q: -float(q["classes"].sigmoid().max() * q["center"].sigmoid()))
            chosen += [(q, k) for q in mine[: max(64 // len(found), 1)]]
        similarity = similarities(image, height, width, bottom)
        for place, k in chosen:
            logits = reference.mask_logits(features, place)
            score, target = logits.sigmoid(), drawn[k, 2::4, 2::4]
            instances += 1
            if masks is not None:
                dice += dice_loss(score, target)
                continue
            projection += dice_loss(score.amax(0), target.amax(0)) + dice_loss(score.amax(1), target.amax(1))
            total, number = pairs(score, target, similarity)
            pairwise, edges = pairwise + total, edges + number
    terms = {"cls": focal / max(positives, 1), "box": giou / weights, "centerness": center / max(positives, 1)}
    if masks is not None:
        return terms | {"dice": dice / max(instances, 1)}
    warm = min(iteration / 10_000, 1.0)
    return terms | {"projection": projection / max(instances, 1), "pairwise": pairwise / max(edges, 1) * warm}


def dice_loss(x: Tensor, target: Tensor) -> float:
    return float(1 - 2 * (x * target).sum() / ((x**2).sum() + (target**2).sum() + 1e-5))


def lab(pixel: list[int]) -> list[float]:
    """8-bit sRGB → CIE-LAB (D65, 2° observer)."""
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v / 255 > 0.04045 else v / 255 / 12.92 for v in pixel]
    rows = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
    xyz = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in rows]
    f = []
    for value, white in zip(xyz, (0.95047, 1.0, 1.08883), strict=True):
        t = value / white
        f.append(t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def similarities(image: Tensor, height: int, width: int, bottom: int) -> dict[tuple[int, int, int, int], float]:
    """(i, j, di, dj) → exp(−‖LAB − LAB‖ / 2) of a cell of 4×4 pixels and its neighbour, 0 where that is not valid."""
    h, w = image.shape[1:]
    padded = F.pad(image.double(), (0, width - w, 0, height - h))
    colors = {}
    for i in range(height // 4):
        for j in range(width // 4):
            mean = padded[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((1, 2))
            colors[i, j] = lab([int(v) for v in mean])
    out = {}
    for i, j in colors:
        for di in (-2, 0, 2):
            for dj in (-2, 0, 2):
                a, b = i + di, j + dj
                if (di or dj) and (a, b) in colors:
                    valid = 4 * a + 2 < h - bottom and 4 * b + 2 < w
                    out[i, j, di, dj] = math.exp(-math.dist(colors[i, j], colors[a, b]) / 2) if valid else 0.0
    return out


def pairs(score: Tensor, inside: Tensor, similarity: dict[tuple[int, int, int, int], float]) -> tuple[float, int]:
    """Σ −log(p_i p_j + (1 − p_i)(1 − p_j)) over the alike pairs whose first cell lies inside, and their number."""
    p, keep = score.tolist(), inside.tolist()
    total, number = 0.0, 0
    for (i, j, di, dj), alike in similarity.items():
        if keep[i][j] and alike >= 0.3:
            a, b = p[i][j], p[i + di][j + dj]
            total -= math.log(a * b + (1 - a) * (1 - b))
            number += 1
    return total, number
