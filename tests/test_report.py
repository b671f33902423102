"""The demo's report: self-contained, escaped, and with every part in it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from jobs import cli, findings, walk
from jobs.report import Quality, Report, Step
from pipelines import settings, storage


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(data, "png")
    return data.getvalue()


@pytest.fixture
def report() -> Report:
    return Report(
        title="Shapes <demo>",
        lead="16 images & 96 boxes.",
        figures=[("Mask IoU", "0.912"), ("Model", "shapes/1 @champion")],
        pictures_note="Held-out images.",
        pictures=[[("boxes", png("red")), ("our masks", png("green")), ("true masks", png("blue"))]],
        quality_note="Boxes given.",
        quality=[Quality("our masks", 0.912, 0.8, ours=True), Quality("filled box", 0.7, None)],
        curves={
            "loss": {"total": [(0, 2.0), (50, 1.0), (100, 0.5)], "pairwise": [(0, 1.0), (100, 0.1)]},
            "validation": {},
        },
        steps=[Step("shard", "4 images", 1.25)],
        commands=[("Look", "boxinst review --app")],
        environment={"torch": "2.0", "cores": "2"},
    )


class Page(HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_loads_nothing_from_elsewhere(report: Report) -> None:
    page = Page(report.html())
    assert page.open == []
    assert page.loads
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert "url(http" not in report.html()


def test_pictures_are_inside(report: Report) -> None:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', report.html())
    assert [base64.b64decode(f) for f in found] == [data for _, data in report.pictures[0]]


def test_text_is_escaped_and_complete(report: Report) -> None:
    text = report.html()
    assert "Shapes &lt;demo&gt;" in text
    assert "Shapes <demo>" not in text
    assert "16 images &amp; 96 boxes." in text
    for word in ("shapes/1 @champion", "0.912", "0.800", "filled box", "4 images", "1.2", "boxinst review --app"):
        assert word in text
    assert "$" not in re.sub(r"data:image/png;base64,[^\"]+", "", text), "a place of the template was left open"


def test_what_was_not_measured_is_a_dash_and_not_a_zero(report: Report) -> None:
    row = next(r for r in report.html().split("<tr") if "filled box" in r)
    assert "–" in row
    assert "0.000" not in row


def test_curves_are_drawn_line_by_line(report: Report) -> None:
    charts = re.findall(r"<svg.*?</svg>", report.html(), re.DOTALL)
    assert len(charts) == 2
    assert "total" in charts[0]
    assert "pairwise" in charts[0]
    drawn = [len(re.findall(r"<path [^>]*stroke-width: 1.6", chart)) for chart in charts]
    assert drawn == [2 + 2, 0], "two lines and their two keys; nothing where there are no points"


def test_the_report_lies_in_the_store_on_s3(
    report: Report, s3: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BOXINST_STORE", f"{s3}/store")
    corpus = settings.home() / "demo" / "shapes" / "corpus"  # as if drawn before
    for name in ("images/1.png", *(f"annotations/instances_{k}.json" for k in ("train", "val", "val_boxes"))):
        storage.write_bytes(str(corpus / name), b"{}")
    monkeypatch.setattr(walk, "go", lambda path: path)  # all between the corpus and the report is tested elsewhere
    page = report.html()
    monkeypatch.setattr(findings, "report", lambda path, outcome: SimpleNamespace(html=lambda: page))
    monkeypatch.setattr(findings, "table", lambda path, outcome: "")
    assert cli.main(["demo"]) == 0
    assert storage.read_bytes(f"{s3}/store/demo/shapes/report.html").decode() == page
    assert f"Made a report: {s3}/store/demo/shapes/report.html" in capsys.readouterr().out
    assert list(home.rglob("*.html")) == []
