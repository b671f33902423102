"""The demo's report: one HTML file with its pictures and curves inside, which opens anywhere and loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template


@dataclass
class Step:
    """One step of the path."""

    name: str
    result: str
    """What came of it, in words."""
    seconds: float
    command: str = ""
    """What was run."""


@dataclass
class Quality:
    """One row of the table of mask quality; a number that was not measured is None."""

    name: str
    mask_iou: float | None
    mask_ap: float | None
    ours: bool = False


@dataclass
class Report:
    """What the page says, from the top down."""

    title: str
    lead: str
    figures: list[tuple[str, str]]
    """(label, value), the most important first."""
    pictures_note: str
    pictures: list[list[tuple[str, bytes]]]
    """Rows of (caption, PNG)."""
    quality_note: str
    quality: list[Quality]
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    """Chart title → line name → (step, value)."""
    steps: list[Step]
    commands: list[tuple[str, str]]
    """(what for, command)."""
    environment: dict[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """The page as text; every value is escaped."""
        template = Template((files("jobs") / "templates" / "report.html").read_text())
        return template.substitute(
            title=escape(self.title),
            lead=escape(self.lead),
            figures="".join(_figure(i, *figure) for i, figure in enumerate(self.figures)),
            pictures_note=escape(self.pictures_note),
            pictures="\n".join(map(_picture_row, self.pictures)),
            quality_note=escape(self.quality_note),
            quality=_quality(self.quality),
            curves="\n".join(f"<figure>{_chart(name, lines)}</figure>" for name, lines in self.curves.items()),
            steps=_steps(self.steps),
            commands="\n".join(f'<p class="do">{escape(why)}</p><pre>{escape(c)}</pre>' for why, c in self.commands),
            environment="".join(
                f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in self.environment.items()
            ),
        )


def _figure(position: int, label: str, value: str) -> str:
    first = ' class="first"' if position == 0 else ""
    return f"<div{first}><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"


def _picture_row(pictures: Sequence[tuple[str, bytes]]) -> str:
    cells = (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, png in pictures
    )
    return f'<div class="row">{"".join(cells)}</div>'


def _quality(rows: Iterable[Quality]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    lines = ['<tr><th>Masks</th><th class="number">Mean mask IoU</th><th></th><th class="number">Mask AP</th></tr>']
    for row in rows:
        bar = "" if row.mask_iou is None else f'<span class="bar" style="width:{100 * row.mask_iou:.1f}%"></span>'
        mark = ' class="ours"' if row.ours else ""
        lines.append(
            f"<tr{mark}><td>{escape(row.name)}</td>"
            f'<td class="number">{number(row.mask_iou)}</td><td class="chart">{bar}</td>'
            f'<td class="number">{number(row.mask_ap)}</td></tr>'
        )
    return "".join(lines)


def _steps(steps: Iterable[Step]) -> str:
    lines = ['<tr><th>Step</th><th>Result</th><th class="number">Seconds</th></tr>']
    for step in steps:
        lines.append(
            f"<tr><td>{escape(step.name)}</td><td>{escape(step.result)}<code>{escape(step.command)}</code></td>"
            f'<td class="number">{step.seconds:.1f}</td></tr>'
        )
    return "".join(lines)


def _chart(title: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """A line chart as inline SVG whose text and axes take the page's colour, light or dark."""
    import matplotlib
    from matplotlib.figure import Figure

    neutral = "#7f8c9a"
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), color in zip(lines.items(), _colors(), strict=False):
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, label=name, color=color, linewidth=1.6, marker="o" if len(points) < 4 else None)
        axes.set_title(title, loc="left", fontsize=10, color=neutral)
        axes.set_xlabel("step", color=neutral)
        axes.tick_params(colors=neutral, length=3)
        axes.grid(color=neutral, alpha=0.2, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(neutral)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=len(lines), frameon=False, labelcolor=neutral, fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _colors() -> list[str]:
    return ["#0f8f88", "#d9822b", "#6c5fc7", "#c2416b", "#4a7fb5", "#7a8b2f", "#8c6d4f", "#555f6b"]
