"""From the network's outputs and a batch's labels to one loss and its terms, for boxes, masks or a mix of both.

BoxInst: arXiv 2012.02310. An instance with a mask label is trained by the dice loss on it; one with only a box by
the projection and pairwise losses; a box that a crop has cut trains the detector but no mask.

Shape letters: N images, P instances, n instances of one image, L locations, K colour neighbours, h and w cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from boxinst import losses, priors
from boxinst.condinst import Outputs
from boxinst.config import ANY_FILL, LossConfig, ModelConfig
from boxinst.dynamic import (
    HeadShape,
    aligned_upsample,
    box_masks,
    dynamic_mask_windows,
    dynamic_masks,
    gather_windows,
    upsample,
    window_groups,
)
from boxinst.fcos import DenseOutputs, Locations, assign, locations, sample_positives, sampling_centers
from boxinst.prompts import prompt_coordinates
from boxinst.structures import Batch, Targets


@dataclass
class _MaskSums:
    """Sums of the mask terms before they are divided; each a scalar."""

    projection: Tensor
    dice: Tensor
    pairwise: Tensor
    edges: Tensor
    """Number of edges summed in ``pairwise``."""
    boxes: Tensor
    """Instances trained by their box."""
    masks: Tensor
    """Instances trained by their mask."""
    imitation: Tensor
    fill: Tensor
    region: Tensor
    overlap: Tensor
    shared: Tensor
    """Number of cells that several boxes hold, for ``overlap``."""

    def __add__(self, other: _MaskSums) -> _MaskSums:
        return _MaskSums(*(getattr(self, k) + getattr(other, k) for k in self.__dataclass_fields__))


@dataclass
class Windows:
    """Given boxes whose windows have one size, on the device."""

    rows: Tensor
    """[m] int64, rows of ``Outputs.prompt``."""
    boxes: Tensor
    """[m, 4] xyxy pixels."""
    images: Tensor
    """[m] int64."""
    origins: Tensor
    """[m, 2] (column, row) of each window's first cell, at the mask stride."""
    size: tuple[int, int]
    """(rows, columns) in cells."""


class Criterion:
    """The training loss of a network.

    Args:
        model: the network's config.
        config: weights and constants.
    """

    def __init__(self, model: ModelConfig, config: LossConfig) -> None:
        self.model, self.config = model, config

    def __call__(self, outputs: Outputs, batch: Batch, step: int, teacher: Outputs | None = None) -> dict[str, Tensor]:
        """The loss of a batch.

        Every sum is divided by a count over all ranks, so that ranks with few instances weigh as little as they
        should; a batch without any instance still gives every parameter a gradient (of zero).

        Args:
            outputs: of ``CondInst.forward`` with the boxes of ``batch.targets``.
            batch: images, validity and labels.
            step: optimiser step, from 0; it drives the warm-up.
            teacher: what the average of the network so far says of the same images and boxes. Instances with only a box
                then learn from its masks too.

        Returns:
            ``loss`` to call backward on, and its weighted terms, detached: ``projection``, ``pairwise``, ``dice`` for
            prompts, ``detect_projection`` and so on for detection, and ``cls``, ``box``, ``centerness``.
        """
        config = self.config
        similarity = losses.color_similarity(
            batch.images,
            batch.valid,
            stride=self.model.loss_stride,
            kernel_size=config.kernel_size,
            dilation=config.dilation,
            theta=config.theta,
            contrast_reach=config.contrast_reach,
        )
        # Zero, but connected to every output: no parameter is ever without a gradient, on any rank.
        total = outputs.mask_features.sum() * 0
        terms: dict[str, Tensor] = {}
        if outputs.prompt is not None:
            total = total + outputs.prompt.sum() * 0
            terms |= self._weigh(self._prompt_sums(outputs, batch, similarity, teacher), step, prefix="")
        if outputs.dense is not None:
            dense = outputs.dense
            controller = (dense.controllers.weight, dense.controllers.bias)
            for tensor in (dense.class_logits, dense.distances, dense.centerness, *controller):
                total = total + tensor.sum() * 0
            detection, sums = self._detect(outputs.mask_features, dense, batch, similarity, step)
            terms |= detection
            terms |= self._weigh(sums, step, prefix="detect_")
        total = total + sum(terms.values())
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}

    def _weigh(self, sums: _MaskSums, step: int, prefix: str) -> dict[str, Tensor]:
        """Sums → weighted means. With mixed labels every instance counts alike, whichever loss it takes, but for
        the weights."""
        counts = torch.stack([sums.edges, sums.boxes, sums.masks, sums.shared])
        edges, boxes, masks, shared = _mean_over_ranks(counts).unbind()
        least = 1 / _ranks()  # one instance or edge over all ranks
        instances = (boxes + masks).clamp(min=least)
        warmup = losses.warmup(step + 1, self.config.warmup_steps)
        terms = {
            "projection": sums.projection / instances * self.config.projection_weight,
            "pairwise": sums.pairwise
            / edges.clamp(min=least)
            * (boxes / instances)
            * self.config.pairwise_weight
            * warmup,
            "dice": sums.dice / instances * self.config.mask_weight,
        }
        if self.config.teacher_weight:
            terms["imitation"] = sums.imitation / instances * self.config.teacher_weight
        if self.config.fill_range != ANY_FILL:
            terms["fill"] = sums.fill / instances * self.config.fill_weight
        if self.config.region_weight:
            terms["region"] = sums.region / instances * self.config.region_weight * warmup
        if self.config.overlap_weight:
            terms["overlap"] = sums.overlap / shared.clamp(min=least) * self.config.overlap_weight * warmup
        return {prefix + name: term for name, term in terms.items()}

    def _prompt_sums(self, outputs: Outputs, batch: Batch, similarity: Tensor, teacher: Outputs | None) -> _MaskSums:
        """Mask losses of the given boxes, each in a window around its box."""
        assert outputs.prompt is not None
        model, stride, device = self.model, self.model.loss_stride, outputs.prompt.device
        # All is planned on the host, and what a group of windows needs is sent over: no step waits for the device.
        boxes = torch.cat([t.boxes for t in batch.host])
        image_index = torch.cat([torch.full_like(t.labels, n) for n, t in enumerate(batch.host)])
        by_mask = torch.cat([t.has_mask for t in batch.host])
        usable = torch.cat([t.tight & ~t.crowd for t in batch.host])
        sums = self._nothing(outputs.prompt)
        owners = priors.Owners(similarity)
        surroundings = priors.Surroundings(batch, stride) if self.config.region_weight else None
        # The window must also hold the other end of every colour edge that starts inside the box.
        least = max(4 * model.mask_stride, self.config.dilation * (self.config.kernel_size // 2) * stride)
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)
        margin = (longer * self.config.prompt_margin).clamp(min=least)
        grid = (outputs.mask_features.shape[2], outputs.mask_features.shape[3])
        selected = usable.nonzero().squeeze(1)
        for group in window_groups(boxes[selected], grid, model.mask_stride, margin[selected]):
            who = selected[group.members]
            size = (group.size[0] * 2, group.size[1] * 2)  # at the loss stride
            truth = None
            if bool(by_mask[who].any()):
                truth = _mask_windows(batch.targets, who, group.origins * 2, size, stride)
            rows, given, images, masked, origins = (
                x.to(device, non_blocking=True)
                for x in (who, boxes[who], image_index[who], by_mask[who], group.origins)
            )
            of = Windows(rows, given, images, origins, group.size)
            logits = self._prompt_logits(outputs, of)
            windows = box_masks(given, size, stride, origins * 2)
            sums = sums + self._mask_sums(
                logits, similarity, windows, ~masked, masked, truth, images, corners=(origins * 2).flip(1)
            )
            if teacher is not None:
                imitation = priors.imitation_terms(logits, self._prompt_logits(teacher, of), windows)
                sums.imitation = sums.imitation + (imitation * ~masked).sum()
            if self.config.fill_range != ANY_FILL:
                fill = priors.fill_terms(logits, windows, self.config.fill_range)
                sums.fill = sums.fill + (fill * ~masked).sum()
            if surroundings is not None:
                colors, weights = surroundings.of(given, windows, images, origins * 2)
                sums.region = sums.region + (priors.region_terms(logits, colors, weights) * ~masked).sum()
            if self.config.overlap_weight:
                owners.add(logits, windows, images, (origins * 2).flip(1))
        if self.config.overlap_weight:
            sums.overlap, sums.shared = owners.losers()
        return sums

    def _prompt_logits(self, outputs: Outputs, of: Windows) -> Tensor:
        """Mask logits [m, h, w] at the loss stride, of given boxes in their windows."""
        assert outputs.prompt is not None
        points, scales = prompt_coordinates(of.boxes)
        coarse = dynamic_mask_windows(
            outputs.mask_features,
            of.images,
            outputs.prompt[of.rows],
            points,
            scales,
            of.origins,
            of.size,
            head=HeadShape.of(self.model),
            stride=self.model.mask_stride,
        )
        return upsample(coarse.float(), 2)

    def _detect(
        self, features: Tensor, dense: DenseOutputs, batch: Batch, similarity: Tensor, step: int
    ) -> tuple[dict[str, Tensor], _MaskSums]:
        """Losses of the FCOS head, and mask losses of its positive locations."""
        places = locations(dense.grids, dense.class_logits.device)
        focal, box, center = [], [], []
        counts, weights = [], []
        kept, owners, chosen = [], [], []
        for n, (targets, host) in enumerate(zip(batch.targets, batch.host, strict=True)):
            if bool(host.crowd.any()):
                others = (~host.crowd).nonzero().squeeze(1)
                targets = targets[others.to(places.points.device, non_blocking=True)]
            centers = sampling_centers(
                targets.boxes,
                (batch.images.shape[2], batch.images.shape[3]),
                None if targets.masks is None else targets.masks & targets.has_mask[:, None, None],
            )
            assigned = assign(places, targets.boxes, centers)
            # Over all locations, with weights: to pick the positive ones, one would have to wait for their number.
            positive = (assigned.instance >= 0).float()
            wanted = torch.zeros_like(dense.class_logits[n], dtype=torch.float32)
            if len(targets):
                label = targets.labels[assigned.instance.clamp(min=0)]
                wanted.scatter_(1, label[:, None], positive[:, None])
            weight = assigned.centerness  # 0 on background
            focal.append(losses.focal_loss(dense.class_logits[n], wanted))
            box.append(losses.giou_loss(dense.distances[n], assigned.distances, weight))
            center.append(losses.centerness_loss(dense.centerness[n], weight, positive))
            counts.append(positive.sum())
            weights.append(weight.sum())
            kept.append(targets)
            owners.append(assigned.instance)
            chosen.append(self._positives(dense, n, targets, assigned.instance))
        sums = self._nothing(features)
        for n, where in enumerate(self._drawn(chosen, step)):
            sums = sums + self._detect_mask_sums(features, dense, places, n, kept[n], owners[n], where, similarity)
        sizes = torch.stack([torch.stack(counts).sum(), torch.stack(weights).sum()])
        count, weight = _mean_over_ranks(sizes).unbind()
        count = count.clamp(min=1 / _ranks())
        terms = {
            "cls": torch.stack(focal).sum() / count,
            "box": torch.stack(box).sum() / weight.clamp(min=1e-6),
            "centerness": torch.stack(center).sum() / count,
        }
        return terms, sums

    def _positives(self, dense: DenseOutputs, n: int, targets: Targets, instance: Tensor) -> Tensor:
        """Indices of the positive locations of one image that get mask losses, before any limit for all images; −1
        where a slot stays empty."""
        if not len(targets):
            return instance.new_zeros(0)
        usable = torch.where(targets.tight[instance.clamp(min=0)], instance, -1)
        if self.config.max_positives_in_all:
            return (usable >= 0).nonzero().squeeze(1)  # as many as there are: this one way waits for the device
        # The best class, not the true one, as published.
        quality = dense.class_logits[n].float().amax(1).sigmoid() * dense.centerness[n].float().sigmoid()
        slots = sample_positives(usable, quality.detach(), self.config.max_positives, len(targets))
        # On a GPU it costs less to compute for the empty slots than to wait for their number.
        return slots[slots >= 0] if slots.device.type == "cpu" else slots

    def _drawn(self, chosen: list[Tensor], step: int) -> list[Tensor]:
        """At most ``max_positives_in_all`` of the locations of all images together, the same ones for the same step."""
        limit, lengths = self.config.max_positives_in_all, [len(where) for where in chosen]
        if not limit or sum(lengths) <= limit:
            return chosen
        keep = torch.zeros(sum(lengths), dtype=torch.bool)
        keep[torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(step))[:limit]] = True
        parts = keep.split(lengths)
        return [where[part.to(where.device)] for where, part in zip(chosen, parts, strict=True)]

    def _detect_mask_sums(
        self,
        features: Tensor,
        dense: DenseOutputs,
        places: Locations,
        n: int,
        targets: Targets,
        instance: Tensor,
        where: Tensor,
        similarity: Tensor,
    ) -> _MaskSums:
        """Mask losses of the locations ``where`` of one image, over the whole map as published; −1 stands for none."""
        if not len(where):
            return self._nothing(features)
        taken, where = where >= 0, where.clamp(min=0)
        who, stride = instance[where].clamp(min=0), self.model.loss_stride
        coarse = dynamic_masks(
            features[n : n + 1],
            [0] * len(where),
            dense.controllers.at(n, where),
            places.points[where],
            places.sizes[where, None].expand(-1, 2),
            head=HeadShape.of(self.model),
            stride=self.model.mask_stride,
        )
        logits = aligned_upsample(coarse.float(), 2)
        size = (logits.shape[1], logits.shape[2])
        # As published a box holds every pixel that it covers in part, and a cell stands for one of them.
        covered = torch.cat([targets.boxes[:, :2].floor(), targets.boxes[:, 2:]], 1)
        windows = box_masks(covered, size, stride)[who]
        masked = targets.has_mask[who]
        truth = None
        if targets.masks is not None:
            truth = targets.masks[:, stride // 2 :: stride, stride // 2 :: stride][who]
        index = torch.full_like(where, n)
        return self._mask_sums(logits, similarity, windows, ~masked & taken, masked & taken, truth, index)

    def _mask_sums(
        self,
        logits: Tensor,
        similarity: Tensor,
        windows: Tensor,
        by_box: Tensor,
        by_mask: Tensor,
        truth: Tensor | None,
        image_index: Tensor,
        corners: Tensor | None = None,
    ) -> _MaskSums:
        """Mask terms before division.

        Args:
            logits: [P, h, w] over the whole map, or over windows of it.
            similarity: [N, K, H, W] over the whole map.
            windows: [P, h, w] the boxes.
            by_box: [P] which instances are trained by their box.
            by_mask: [P] which ones by their mask.
            truth: [P, h, w] those masks, or None when there are none.
            image_index: [P].
            corners: [P, 2] (row, column) of each window's first cell, or None for the whole map.
        """
        config, zero = self.config, logits.sum() * 0
        projection = (losses.projection_terms(logits, windows) * by_box).sum()
        dice = logits.sum() * 0
        if truth is not None:
            dice = (losses.dice_terms(logits, truth) * by_mask).sum()
        pairwise, edges = losses.pairwise_terms(
            logits,
            similarity,
            windows & by_box[:, None, None],
            image_index=image_index,
            corners=corners,
            threshold=config.color_threshold,
            kernel_size=config.kernel_size,
            dilation=config.dilation,
        )
        counts = edges.float(), by_box.sum().float(), by_mask.sum().float()
        return _MaskSums(projection, dice, pairwise, *counts, *[zero] * 5)

    @staticmethod
    def _nothing(like: Tensor) -> _MaskSums:
        zero = torch.zeros((), device=like.device)
        return _MaskSums(*[zero] * 11)


def _mask_windows(targets: list[Targets], who: Tensor, origins: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """True masks of the instances ``who`` (positions in the concatenated targets) in their windows → [m, h, w] bool.

    ``who`` and ``origins`` are in host memory, and the masks come out where the targets are.
    """
    start, device = 0, targets[0].boxes.device
    out = torch.zeros((len(who), *size), dtype=torch.bool, device=device)
    for t in targets:
        mine = ((who >= start) & (who < start + len(t))).nonzero().squeeze(1)
        if t.masks is not None and len(mine):
            grid = t.masks[:, stride // 2 :: stride, stride // 2 :: stride]
            rows, index, corner = (x.to(device, non_blocking=True) for x in (mine, who[mine] - start, origins[mine]))
            out[rows] = gather_windows(grid[:, None], index, corner, size)[:, 0]
        start += len(t)
    return out


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of ``values`` over the ranks of distributed training: gradients are averaged, so denominators are too."""
    if _ranks() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / _ranks()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
