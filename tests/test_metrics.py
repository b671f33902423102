"""The scorers against pycocotools' own summary and against loops; merging; the baselines."""

from __future__ import annotations

import contextlib
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from boxinst import metrics, rle
from boxinst.errors import InputError
from boxinst.structures import Instances, Targets

HEIGHT, WIDTH = 120, 160
CLASSES = ("a", "b", "c")


def ellipses(count: int, rng: np.random.Generator, largest: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole-pixel boxes [n, 4] and their inscribed ellipses."""
    size = rng.integers(6, largest, (count, 2))
    corner = (rng.random((count, 2)) * (np.array([WIDTH, HEIGHT]) - size)).astype(int)
    boxes = torch.from_numpy(np.concatenate([corner, corner + size], 1)).float()
    return boxes, metrics.inscribed_ellipse(boxes, HEIGHT, WIDTH)


def truth_and_found(seed: int, crowd: bool = True) -> tuple[Targets, Instances]:
    """Objects of three classes; detections that are shifted, doubled, missing or of the wrong class."""
    rng = np.random.default_rng(seed)
    boxes, _ = ellipses(int(rng.integers(3, 9)), rng, largest=110)
    boxes[1] = torch.tensor([5.0, 4, 145, 112])  # one that is large by COCO's measure
    masks = metrics.inscribed_ellipse(boxes, HEIGHT, WIDTH)
    n = len(boxes)
    targets = Targets(boxes, torch.from_numpy(rng.integers(0, 3, n)), masks)
    if crowd:
        targets.crowd[0] = True
    picked = rng.permutation(np.repeat(np.arange(n), 2))[: n + 3]
    shift = torch.from_numpy(rng.integers(-3, 4, (len(picked), 2))).float().repeat(1, 2)
    moved = (boxes[picked] + shift).clamp(min=0)
    labels = torch.where(torch.from_numpy(rng.random(len(picked)) < 0.15), 0, targets.labels[picked])
    found = metrics.inscribed_ellipse(moved, HEIGHT, WIDTH)
    scores = torch.from_numpy(rng.random(len(picked)).round(2)).float()
    return targets, Instances(moved, scores, labels, found)


def coco_summary(data: dict[int, tuple[Targets, Instances]], iou_type: str) -> np.ndarray:
    """COCO's own way: files' worth of JSON, ``loadRes`` and ``summarize``."""
    truth, found = [], []
    for image_id, (targets, instances) in data.items():
        for box, label, mask, crowd in zip(targets.boxes, targets.labels, targets.masks, targets.crowd, strict=True):
            counts = rle.encode(mask[None])[0]
            x0, y0, x1, y1 = box.tolist()
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "iscrowd": int(crowd),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
                    "area": int(mask.sum()),
                }
            )
        for box, label, mask, score in zip(
            instances.boxes, instances.labels, instances.masks, instances.scores, strict=True
        ):
            x0, y0, x1, y1 = box.tolist()
            result = {"image_id": image_id, "category_id": int(label) + 1, "score": float(score)}
            if iou_type == "bbox":
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            else:
                result["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": rle.encode(mask[None])[0]}
            found.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in data],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
            "annotations": truth,
            "info": {},
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), iou_type)
        evaluation.params.maxDets = [1, 10, 100]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def scored(data: dict[int, tuple[Targets, Instances]], **options: int) -> metrics.CocoScorer:
    scorer = metrics.CocoScorer(CLASSES, **options)
    for image_id, (targets, instances) in data.items():
        scorer.update(image_id, HEIGHT, WIDTH, instances, targets)
    return scorer


@pytest.fixture(scope="module")
def data() -> dict[int, tuple[Targets, Instances]]:
    return {image_id: truth_and_found(image_id) for image_id in range(12)}


# ------------------------------------------------------------------------------------------------ COCO AP


@pytest.mark.parametrize(("kind", "iou_type"), [("mask", "segm"), ("box", "bbox")])
def test_ap_equals_cocos_summary(data, kind: str, iou_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    stats = coco_summary(data, iou_type)
    figures = scored(data).compute()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    assert [figures[f"{kind}_{name}"] for name in names] == pytest.approx(stats[:6].tolist())
    assert 0.05 < figures[f"{kind}_ap"] < 0.95
    assert len(set(figures.values())) > 8
    assert capsys.readouterr().out == ""


def test_a_perfect_result_scores_one_unless_cut_off() -> None:
    """150 objects in an image: with the limit at COCO's 100 a third of them counts as missed."""
    boxes, masks = ellipses(150, np.random.default_rng(0), largest=9)
    targets = Targets(boxes, torch.zeros(150, dtype=torch.int64), masks)
    perfect = Instances(boxes, torch.ones(150), targets.labels, masks)
    full = scored({1: (targets, perfect)}, max_detections=1000).compute()
    assert full == pytest.approx(dict.fromkeys(full, 1.0))
    assert "mask_ap_large" not in full  # no truth, no figure
    assert scored({1: (targets, perfect)}).compute()["mask_ap"] == pytest.approx(67 / 101)


def test_classes_without_truth_do_not_count_and_wrong_classes_do() -> None:
    boxes, masks = ellipses(4, np.random.default_rng(1))
    targets = Targets(boxes, torch.tensor([1, 1, 1, 1]), masks)
    right = Instances(boxes, torch.ones(4), targets.labels, masks)
    assert scored({1: (targets, right)}).compute()["mask_ap"] == pytest.approx(1)
    assert scored({1: (targets, replace(right, labels=torch.zeros(4)))}).compute()["mask_ap"] == 0


def test_images_without_all_masks_count_for_boxes_alone(data) -> None:
    targets, instances = data[3]
    partly = replace(targets, has_mask=torch.arange(len(targets)) > 1)
    without = replace(targets, masks=None, has_mask=None)
    rest = {i: pair for i, pair in data.items() if i != 3}
    for changed in (partly, without):
        figures = scored({**data, 3: (changed, instances)}).compute()
        assert figures["mask_ap"] == scored(rest).compute()["mask_ap"]
        assert figures["box_ap"] == pytest.approx(scored(data).compute()["box_ap"])
    assert "mask_ap" not in scored({3: (without, instances)}).compute()
    assert scored(data).compute(["mask"]).keys() == {k for k in scored(data).compute() if k.startswith("mask")}


def test_nothing_found_scores_zero_and_no_truth_scores_nothing(data) -> None:
    targets, instances = data[0]
    nothing = Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0, HEIGHT, WIDTH).bool())
    assert scored({1: (targets, nothing)}).compute()["mask_ap"] == 0
    empty = targets[torch.zeros(0, dtype=torch.int64)]
    assert scored({1: (empty, instances)}).compute() == {}
    assert metrics.CocoScorer(CLASSES).compute() == {}


def test_merged_scorers_equal_one_and_an_image_given_twice_counts_once(data) -> None:
    whole = scored(data).compute()
    first = scored({i: data[i] for i in range(7)})
    second = scored({i: data[i] for i in range(5, 12)})
    first.merge(pickle.loads(pickle.dumps(second.state())))
    assert first.compute() == whole


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"max_detections: 0\. Give at least 1"):
        metrics.CocoScorer(CLASSES, max_detections=0)


# ------------------------------------------------------------------------------------------------ IoU and consistency


def test_mask_iou_equals_counting() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, 9, 11, generator=rng) > 0.5 for _ in range(2))
    a[3] = False
    a[4] = b[4] = False
    expected = []
    for x, y in zip(a, b, strict=True):
        union = int((x | y).sum())
        expected.append(int((x & y).sum()) / union if union else 0.0)
    assert metrics.mask_iou(a, b).tolist() == pytest.approx(expected)
    assert metrics.mask_iou(a[:0], b[:0]).shape == (0,)


def reference_consistency(mask: torch.Tensor, box: torch.Tensor) -> tuple[float, float, float]:
    """Pixel by pixel: each is a square that may overlap the box in part."""
    x0, y0, x1, y1 = box.tolist()
    cells = mask.nonzero().tolist()
    if not cells:
        return 0.0, 0.0, 0.0
    inside = sum(max(0.0, min(c + 1, x1) - max(c, x0)) * max(0.0, min(r + 1, y1) - max(r, y0)) for r, c in cells)
    rows, columns = [r for r, _ in cells], [c for _, c in cells]
    left, right, top, bottom = min(columns), max(columns) + 1, min(rows), max(rows) + 1
    overlap = max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0))
    area = (x1 - x0) * (y1 - y0)
    union = (right - left) * (bottom - top) + area - overlap
    return overlap / union, 1 - inside / len(cells), inside / area


@pytest.mark.parametrize("chunk", [1, 1 << 19])
def test_consistency_equals_the_reference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    boxes, masks = ellipses(24, rng)
    boxes = boxes + torch.from_numpy(rng.normal(0, 2, (24, 4))).float()  # fractional, partly outside the image
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    masks[5] = False
    masks[6] = torch.from_numpy(rng.random((HEIGHT, WIDTH)) < 0.01)
    expected = torch.tensor([reference_consistency(m, b) for m, b in zip(masks, boxes, strict=True)])
    for got, column in zip(metrics.mask_box_consistency(masks, boxes), expected.unbind(1), strict=True):
        torch.testing.assert_close(got, column, rtol=1e-4, atol=1e-5)


def test_consistency_of_plain_cases() -> None:
    boxes = torch.tensor([[2.0, 3, 6, 8]]).repeat(5, 1)
    boxes[4] = torch.tensor([4.0, 4, 4, 4])  # no area
    masks = torch.zeros(5, 10, 10, dtype=torch.bool)
    masks[0, 3:8, 2:6] = True  # the box itself
    masks[1, 3:8, 2:10] = True  # twice as wide
    masks[2, :2] = True  # elsewhere
    masks[4, 3:6, 3:6] = True
    box_iou, spill, fill = metrics.mask_box_consistency(masks, boxes)
    assert box_iou.tolist() == pytest.approx([1, 0.5, 0, 0, 0])
    assert spill.tolist() == pytest.approx([0, 0.5, 1, 0, 1])
    assert fill.tolist() == pytest.approx([1, 1, 0, 0, 0])
    assert [x.shape for x in metrics.mask_box_consistency(masks[:0], boxes[:0])] == [(0,)] * 3


# ------------------------------------------------------------------------------------------------ given boxes


def given(seed: int) -> tuple[Instances, Targets]:
    """The filled box as the prediction for each target."""
    targets, _ = truth_and_found(seed, crowd=False)
    masks = metrics.filled_box(targets.boxes, HEIGHT, WIDTH)
    return Instances(targets.boxes, torch.ones(len(targets)), targets.labels, masks), targets


def test_given_box_means_are_over_instances() -> None:
    scorer = metrics.GivenBoxScorer()
    ious, fills = [], []
    for seed in range(4):
        instances, targets = given(seed)
        instances.masks[0] = False
        scorer.update(instances, targets)
        ious += metrics.mask_iou(instances.masks, targets.masks).tolist()
        fills += [0.0] + [1.0] * (len(targets) - 1)
    figures = scorer.compute()
    assert figures["instances"] == len(ious) > 12
    assert figures["mask_iou"] == pytest.approx(np.mean(ious))
    assert figures["fill"] == figures["fill_over_95"] == figures["box_iou"] == pytest.approx(np.mean(fills))
    assert figures["fill_under_05"] == pytest.approx(4 / len(ious))
    assert figures["spill"] == 0


def test_crowds_and_missing_mask_labels_are_left_out() -> None:
    instances, targets = given(0)
    unlabelled = replace(targets, has_mask=torch.arange(len(targets)) != 1, crowd=torch.arange(len(targets)) == 0)
    scorer = metrics.GivenBoxScorer()
    scorer.update(instances, unlabelled)
    figures = scorer.compute()
    assert figures["instances"] == len(targets) - 1
    expected = metrics.mask_iou(instances.masks, targets.masks)[2:].mean()
    assert figures["mask_iou"] == pytest.approx(float(expected))
    boxes_only = metrics.GivenBoxScorer()
    boxes_only.update(instances, replace(targets, masks=None, has_mask=None))
    assert "mask_iou" not in boxes_only.compute()
    assert metrics.GivenBoxScorer().compute() == {"instances": 0}


def test_merged_given_box_scorers_equal_one() -> None:
    whole, first, second = (metrics.GivenBoxScorer() for _ in range(3))
    for seed in range(6):
        whole.update(*given(seed))
        (first if seed < 2 else second).update(*given(seed))
    first.merge(pickle.loads(pickle.dumps(second.state())))
    assert first.compute() == pytest.approx(whole.compute())


def test_masks_that_do_not_match_the_boxes_are_refused() -> None:
    instances, targets = given(0)
    with pytest.raises(InputError, match=r"instances: \d+ for 1 boxes\. Give one mask per box"):
        metrics.GivenBoxScorer().update(instances, targets[torch.tensor([0])])


# ------------------------------------------------------------------------------------------------ baselines


def test_baselines_fill_the_box_and_its_ellipse() -> None:
    boxes = torch.tensor([[10.0, 20, 90, 80], [3.4, 4.6, 9.5, 8.5], [-20, -20, 400, 400]])
    filled = metrics.filled_box(boxes, HEIGHT, WIDTH)
    assert rle.extent(rle.encode(filled), HEIGHT, WIDTH).tolist() == [[10, 20, 90, 80], [3, 5, 9, 8], [0, 0, 160, 120]]
    assert filled.sum((1, 2)).tolist() == [80 * 60, 6 * 3, WIDTH * HEIGHT]
    ellipse = metrics.inscribed_ellipse(boxes, HEIGHT, WIDTH)
    assert not (ellipse & ~filled).any()
    assert ellipse[0].sum() / filled[0].sum() == pytest.approx(np.pi / 4, abs=0.005)
    assert rle.extent(rle.encode(ellipse), HEIGHT, WIDTH)[0].tolist() == [10, 20, 90, 80]
