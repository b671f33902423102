"""Score a model on labelled shards: mask AP and mask IoU where there are masks, consistency with the boxes always.

boxinst evaluate --model models:/cells@champion --shards shards/val --max-detections 1000
boxinst evaluate --model models:/cells@champion --shards shards/val --mode detect
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from jobs import cli, options
from pipelines.config import EvaluateConfig

METRICS = {"mask_iou": "mean mask IoU", "mask_ap": "mask AP", "mask_ap50": "mask AP50", "mask_ap75": "mask AP75"}
ROWS = {"": "the model", "inscribed_ellipse_": "inscribed ellipse", "filled_box_": "filled box"}


def main(argv: Sequence[str]) -> int:
    """Evaluate as ``argv`` asks."""
    config = options.parse(EvaluateConfig, argv, command="evaluate", about=__doc__)
    from pipelines import evaluate

    figures = evaluate.run(config)
    print(table(figures))
    name = config.model.removeprefix("models:/").partition("@")[0].partition("/")[0]
    then = f"boxinst promote --name {name} --shards {config.shards}" if config.model.startswith("models:/") else ""
    cli.close(f"a score on {cli.count(int(figures['images']), 'image')}", "above", then=then)
    return 0


def table(figures: Mapping[str, float]) -> str:
    """The figures as text: the model beside its baselines, then whatever else was measured."""
    lines = []
    if "mask_ap" in figures:
        lines.append(f"  {'':20}" + "".join(f"{title:>16}" for title in METRICS.values()))
    for row, title in ROWS.items():
        if f"{row}mask_ap" in figures:
            values = (figures.get(f"{row}{metric}") for metric in METRICS)
            lines.append(f"  {title:20}" + "".join(f"{'-' if v is None else f'{v:.4f}':>16}" for v in values))
    rest = [k for k in figures if k not in METRICS and not k.startswith(("inscribed_ellipse_", "filled_box_"))]
    return "\n".join([*lines, *(f"  {key:20}{figures[key]:>16.4f}" for key in rest)])


if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
