"""The registered model as MLflow runs it: encoded images and their boxes in, one RLE mask for every box out.

MLflow copies this file into the logged model ("models from code") and runs it on loading, so nothing is pickled:
the weights are safetensors and the rest is JSON. It must not depend on where the repository lies.
"""

from __future__ import annotations

import base64
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

import boxinst
from boxinst import rle
from pipelines import images


class BoxMasks(PythonModel):
    """One row per image: ``image``, the encoded file (bytes, or base64 text), and ``boxes``, [[x1, y1, x2, y2], ...].

    The answer has one row per image too: ``masks``, COCO RLE objects {"size": [height, width], "counts": text}
    in the order of the boxes, and ``scores``.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network from the artifact "model", a folder that ``boxinst.save`` wrote."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = boxinst.load(context.artifacts["model"], device=device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment the given boxes; images go through the network one by one, at their own size."""
        rows = [self._segment(row.image, row.boxes) for row in pd.DataFrame(model_input).itertuples()]
        return pd.DataFrame(rows, columns=["masks", "scores"])

    def _segment(self, image: bytes | str, boxes: Any) -> tuple[list[dict[str, Any]], list[float]]:
        data = base64.b64decode(image) if isinstance(image, str) else bytes(image)
        pixels = torch.from_numpy(images.decode(data)).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        given = torch.tensor([list(box) for box in boxes], dtype=torch.float32).reshape(-1, 4)
        (found,) = self.model.segment([pixels], [given])
        counts = rle.encode(found.masks.cpu())
        return [{"size": [height, width], "counts": c.decode()} for c in counts], found.scores.tolist()


set_model(BoxMasks())
