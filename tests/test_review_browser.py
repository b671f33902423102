"""A reviewer in a real browser: sees the masks, accepts one, brushes another, and finds both in the feedback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from reviewing import DISCS, HEIGHT, WIDTH, Artefacts, default_mask, disc

from pipelines import feedback
from pipelines.feedback import FeedbackConfig
from pipelines.verdicts import MASKS

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["reviewing"]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run")
QUIET += ("disable-background-networking", "disable-component-update", "disable-sync")

PICTURES = os.environ.get("BOXINST_SCREENSHOTS")
"""A folder to write the pictures of docs/review.md to."""

ACCEPTED, BRUSHED = 0, 1
"""Annotation ids: the two discs of the first image."""

WAIT = 120
"""Seconds for a step on a busy machine; it goes on as soon as the step is done."""

APP = """
import sys
from pipelines.review import ReviewConfig, run
run(ReviewConfig(*sys.argv[1:4], app=True, port=int(sys.argv[4])))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]


@contextmanager
def _app(artefacts: Artefacts, dataset: str) -> Iterator[str]:
    """Address of ``boxinst review --app`` while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-c", APP, artefacts.masks, artefacts.shards, dataset, str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("Review at "))
        yield line.split()[2]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def _browser() -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[f"--{flag}" for flag in QUIET])
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        page.set_default_timeout(1000 * WAIT)
        yield page
        browser.close()


def _picture(page: Page, name: str) -> np.ndarray:
    """The page as seen, RGB [H, W, 3]; also written for the documentation where that is asked for."""
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    if PICTURES:
        seen.quantize(256, Image.Quantize.FASTOCTREE).save(Path(PICTURES) / f"review-{name}.png", optimize=True)
    return np.asarray(seen)


def _masked(seen: np.ndarray) -> int:
    """Pixels in which the masks' magenta lies over the image: red and blue far above green."""
    red, green, blue = (seen[..., k].astype(int) for k in range(3))
    return int(((red - green > 60) & (blue - green > 60)).sum())


def _until(what: str, ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen within {WAIT} s")


def _label(dataset: str, number: int) -> Any:
    """The label as it lies in the database now."""
    import fiftyone as fo

    view = fo.load_dataset(dataset).match(fo.ViewField("image_id") == 0)
    return next(d for d in view.values(f"{MASKS}.detections")[0] if d.annotation_id == number)


def _on_screen(page: Page, canvas: str, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image is on the page: the App fits the image into its canvas."""
    box = page.locator(canvas).last.bounding_box()
    assert box is not None
    scale = min(box["width"] / WIDTH, box["height"] / HEIGHT)
    left = box["x"] + (box["width"] - scale * WIDTH) / 2
    top = box["y"] + (box["height"] - scale * HEIGHT) / 2
    return left + scale * x, top + scale * y


def test_a_reviewer_accepts_one_mask_and_brushes_another(artefacts: Artefacts, tmp_path: Path) -> None:
    dataset = f"browser-{uuid.uuid4().hex[:8]}"
    with _app(artefacts, dataset) as url, _browser() as page:
        page.goto(url)
        page.get_by_text("Dismiss", exact=True).click()  # an advertisement, at the first visit
        page.locator("[data-cy=looker]").nth(3).wait_for()
        assert _until("masks over the images", lambda: _masked(_picture(page, "grid")) > 3000)
        _accept(page, dataset)
        _brush(page, dataset)
        page.goto(f"{url}?view=worst-first")
        page.get_by_text("8 patches").wait_for()
        page.locator("[data-cy=looker]").nth(7).wait_for()
        assert _until("tiles of the queue", lambda: _masked(_picture(page, "queue")) > 3000)

    out = tmp_path / "next.json"
    done = feedback.run(FeedbackConfig(str(out), dataset=dataset))
    assert (done.outcomes["accepted"], done.outcomes["edited"], done.outcomes["unreviewed"]) == (1, 1, 6)
    written = {a["id"]: a for a in json.loads(out.read_text())["annotations"]}
    masks = {n: coco_mask.decode(a["segmentation"]).astype(bool) for n, a in written.items() if "segmentation" in a}
    assert masks.keys() == {ACCEPTED, BRUSHED}
    assert np.array_equal(masks[ACCEPTED], default_mask(0, ACCEPTED))
    x, y, radius = DISCS[BRUSHED]
    before, after = disc(x, y, radius), masks[BRUSHED]
    stroke = after & ~before
    rows, columns = np.nonzero(stroke)
    assert len(rows) > 4
    assert abs(rows.mean() - STROKE_Y) < 2
    assert columns.max() == pytest.approx(STROKE_X[1], abs=3)
    assert (before & ~after).sum() <= 0.02 * before.sum()  # screen resolution and back
    assert written[BRUSHED]["bbox"][0] == x - radius - 0.5  # the given box stays


STROKE_X, STROKE_Y = (90, 118), 50
"""The brush goes from the centre of the second disc beyond its right edge, in the image's pixels."""


def _accept(page: Page, dataset: str) -> None:
    """Select a mask by a click on it, and tag it."""
    page.locator("[data-cy=looker]").first.click()
    canvas = "[data-cy=modal-looker-container]"
    page.locator(canvas).wait_for()
    x, y, _ = DISCS[ACCEPTED]
    _until("the image", lambda: _masked(_picture(page, "image")) > 10_000)
    page.mouse.click(*_on_screen(page, canvas, x, y))
    page.locator("[data-cy=action-tag-sample-labels]").last.click()
    page.get_by_placeholder("tag selected label").fill("accept")
    page.keyboard.press("Enter")
    apply = page.get_by_text("Apply", exact=True)
    apply.wait_for()
    _picture(page, "tag")
    apply.click()
    _until("the verdict in the database", lambda: _label(dataset, ACCEPTED).tags == ["accept"])


def _brush(page: Page, dataset: str) -> None:
    """Open a label in the Annotate tab and draw a stroke from its middle to the right."""
    before = _label(dataset, BRUSHED)
    page.locator("[data-cy=annotate]").click()
    page.locator(f"[data-cy=annotate-label-{before.id}]").click()
    page.locator("[data-cy=annotate-mask-preview]").wait_for()
    page.locator("[data-cy=brush]").click()
    canvas = "[data-cy=lighter-sample-renderer-canvas]"
    ends = [_on_screen(page, canvas, x, STROKE_Y) for x in STROKE_X]
    page.mouse.move(*ends[0])
    page.mouse.down()
    page.mouse.move(*ends[1], steps=20)
    page.mouse.up()
    after = _until("the stroke in the database", lambda: _changed(dataset, before))
    _picture(page, "brush")
    assert after.mask.size > before.mask.size  # at the resolution of the screen
    assert after.label == before.label
    assert after.tags == []


def _changed(dataset: str, before: Any) -> Any:
    label = _label(dataset, BRUSHED)
    return label if label.mask.shape != before.mask.shape else None
