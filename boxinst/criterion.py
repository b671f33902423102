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

from boxinst import losses
from boxinst.condinst import Outputs
from boxinst.config import LossConfig, ModelConfig
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
from boxinst.fcos import (
    SIZES_OF_INTEREST,
    DenseOutputs,
    Locations,
    assign,
    locations,
    sample_positives,
    sampling_centers,
)
from boxinst.predict import prompt_coordinates
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

    def __add__(self, other: _MaskSums) -> _MaskSums:
        return _MaskSums(*(getattr(self, k) + getattr(other, k) for k in self.__dataclass_fields__))


class Criterion:
    """The training loss of a network.

    Args:
        model: the network's config.
        config: weights and constants.
    """

    def __init__(self, model: ModelConfig, config: LossConfig) -> None:
        self.model, self.config = model, config

    def __call__(self, outputs: Outputs, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of a batch.

        Every sum is divided by a count over all ranks, so that ranks with few instances weigh as little as they
        should; a batch without any instance still gives every parameter a gradient (of zero).

        Args:
            outputs: of ``CondInst.forward`` with the boxes of ``batch.targets``.
            batch: images, validity and labels.
            step: optimiser step, from 0; it drives the warm-up.

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
        )
        # Zero, but connected to every output: no parameter is ever without a gradient, on any rank.
        total = outputs.mask_features.sum() * 0
        terms: dict[str, Tensor] = {}
        if outputs.prompt is not None:
            total = total + outputs.prompt.sum() * 0
            terms |= self._weigh(self._prompt_sums(outputs, batch, similarity), step, prefix="")
        if outputs.dense is not None:
            dense = outputs.dense
            for tensor in (dense.class_logits, dense.distances, dense.centerness, dense.controllers):
                total = total + tensor.sum() * 0
            detection, sums = self._detect(outputs.mask_features, dense, batch, similarity, step)
            terms |= detection
            terms |= self._weigh(sums, step, prefix="detect_")
        total = total + sum(terms.values())
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}

    def _weigh(self, sums: _MaskSums, step: int, prefix: str) -> dict[str, Tensor]:
        """Sums → weighted means. With mixed labels every instance counts alike, whichever loss it takes."""
        edges, boxes, masks = _mean_over_ranks(torch.stack([sums.edges, sums.boxes, sums.masks])).unbind()
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
            "dice": sums.dice / instances,
        }
        return {prefix + name: term for name, term in terms.items()}

    def _prompt_sums(self, outputs: Outputs, batch: Batch, similarity: Tensor) -> _MaskSums:
        """Mask losses of the given boxes, each in a window around its box."""
        assert outputs.prompt is not None
        model, stride = self.model, self.model.loss_stride
        boxes = torch.cat([t.boxes for t in batch.targets])
        image_index = torch.cat([torch.full_like(t.labels, n) for n, t in enumerate(batch.targets)])
        by_mask = torch.cat([t.has_mask for t in batch.targets])
        usable = torch.cat([t.tight & ~t.crowd for t in batch.targets])
        points, scales = prompt_coordinates(boxes)
        sums = self._nothing(outputs.prompt)
        # The window must also hold the other end of every colour edge that starts inside the box.
        least = max(4 * model.mask_stride, self.config.dilation * (self.config.kernel_size // 2) * stride)
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)
        margin = (longer * self.config.prompt_margin).clamp(min=least)
        grid = (outputs.mask_features.shape[2], outputs.mask_features.shape[3])
        selected = usable.nonzero().squeeze(1)
        for group in window_groups(boxes[selected], grid, model.mask_stride, margin[selected]):
            who = selected[group.members]
            coarse = dynamic_mask_windows(
                outputs.mask_features,
                image_index[who],
                outputs.prompt[who],
                points[who],
                scales[who],
                group.origins,
                group.size,
                head=HeadShape.of(model),
                stride=model.mask_stride,
            )
            logits = upsample(coarse.float(), 2)  # [m, h, w] at the loss stride
            origins, size = group.origins * 2, (group.size[0] * 2, group.size[1] * 2)
            windows = box_masks(boxes[who], size, stride, origins)
            truth = None
            if bool(by_mask[who].any()):
                truth = _mask_windows(batch.targets, who, origins, size, stride)
            sums = sums + self._mask_sums(
                logits, similarity, windows, by_mask[who], truth, image_index[who], corners=origins.flip(1)
            )
        return sums

    def _detect(
        self, features: Tensor, dense: DenseOutputs, batch: Batch, similarity: Tensor, step: int
    ) -> tuple[dict[str, Tensor], _MaskSums]:
        """Losses of the FCOS head, and mask losses of its positive locations."""
        places = locations(dense.grids, dense.class_logits.device)
        focal, box, center = [], [], []
        counts, weights = [], []
        kept, owners, chosen = [], [], []
        for n, targets in enumerate(batch.targets):
            targets = targets[~targets.crowd]
            centers = sampling_centers(
                targets.boxes,
                (batch.images.shape[2], batch.images.shape[3]),
                None if targets.masks is None else targets.masks & targets.has_mask[:, None, None],
            )
            assigned = assign(places, targets.boxes, centers)
            positive = (assigned.instance >= 0).nonzero().squeeze(1)
            owner = assigned.instance[positive]
            wanted = torch.zeros_like(dense.class_logits[n], dtype=torch.float32)
            wanted[positive, targets.labels[owner]] = 1
            focal.append(losses.focal_loss(dense.class_logits[n], wanted))
            weight = assigned.centerness[positive]
            box.append(losses.giou_loss(dense.distances[n, positive], assigned.distances[positive], weight))
            center.append(losses.centerness_loss(dense.centerness[n, positive], weight))
            counts.append(torch.ones_like(weight).sum())
            weights.append(weight.sum())
            kept.append(targets)
            owners.append(assigned.instance)
            chosen.append(self._positives(dense, n, targets, assigned.instance))
        sums = self._nothing(dense.controllers)
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
        """Indices of the positive locations of one image that get mask losses, before any limit for all images."""
        if not len(targets):
            return instance.new_zeros(0)
        usable = torch.where(targets.tight[instance.clamp(min=0)], instance, -1)
        if self.config.max_positives_in_all:
            return (usable >= 0).nonzero().squeeze(1)
        # The best class, not the true one, as published.
        quality = dense.class_logits[n].float().amax(1).sigmoid() * dense.centerness[n].float().sigmoid()
        return sample_positives(usable, quality.detach(), self.config.max_positives)

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
        """Mask losses of the locations ``where`` of one image, over the whole map as published."""
        if not len(where):
            return self._nothing(dense.controllers)
        who, stride = instance[where], self.model.loss_stride
        scales = torch.tensor(SIZES_OF_INTEREST, device=where.device)[places.levels[where]]
        coarse = dynamic_masks(
            features[n : n + 1],
            [0] * len(where),
            dense.controllers[n, where],
            places.points[where],
            scales[:, None].expand(-1, 2),
            head=HeadShape.of(self.model),
            stride=self.model.mask_stride,
        )
        logits = aligned_upsample(coarse.float(), 2)
        size = (logits.shape[1], logits.shape[2])
        # As published a box holds every pixel that it covers in part, and a cell stands for one of them.
        covered = torch.cat([targets.boxes[:, :2].floor(), targets.boxes[:, 2:]], 1)
        windows = box_masks(covered, size, stride)[who]
        by_mask = targets.has_mask[who]
        truth = None
        if targets.masks is not None and bool(by_mask.any()):
            truth = targets.masks[:, stride // 2 :: stride, stride // 2 :: stride][who]
        index = torch.full_like(where, n)
        return self._mask_sums(logits, similarity, windows, by_mask, truth, index)

    def _mask_sums(
        self,
        logits: Tensor,
        similarity: Tensor,
        windows: Tensor,
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
            by_mask: [P] which instances are trained by their mask.
            truth: [P, h, w] those masks, or None when there are none.
            image_index: [P].
            corners: [P, 2] (row, column) of each window's first cell, or None for the whole map.
        """
        config, by_box = self.config, ~by_mask
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
        return _MaskSums(projection, dice, pairwise, edges.float(), by_box.sum().float(), by_mask.sum().float())

    @staticmethod
    def _nothing(like: Tensor) -> _MaskSums:
        zero = torch.zeros((), device=like.device)
        return _MaskSums(zero, zero, zero, zero, zero, zero)


def _mask_windows(targets: list[Targets], who: Tensor, origins: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """True masks of the instances ``who`` (positions in the concatenated targets) in their windows → [m, h, w] bool."""
    start = 0
    out = torch.zeros((len(who), *size), dtype=torch.bool, device=who.device)
    for t in targets:
        mine = ((who >= start) & (who < start + len(t))).nonzero().squeeze(1)
        if t.masks is not None and len(mine):
            grid = t.masks[:, stride // 2 :: stride, stride // 2 :: stride]
            out[mine] = gather_windows(grid[:, None], who[mine] - start, origins[mine], size)[:, 0]
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
