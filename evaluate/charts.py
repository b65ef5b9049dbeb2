"""Charts of the report page: matplotlib's SVG, in the page's colours and font, light or dark.

Each is made twice, for a wide page and for a phone: scaled down, its text could not be read. No text from a run's
files gets into one but the names of stages; what names curves is HTML beside it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

INK, MUTED, GRID, BAND, RULE = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BAND: "--band", RULE: "--rule"}
VARIABLES |= {colour: f"--c{number}" for number, colour in enumerate(SERIES, 1)}  # placeholders -> style.css
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")  # of the series, for who does not see the colours
MOST = 400  # points of the rounds' line; more are averaged
LINES = 60  # classes with a line each; those of 1,203 are 6.4 MB, and nobody can tell one from another
BANDS = {(0.05, 0.95): GRID, (0.25, 0.75): RULE}  # of more classes, between these quantiles
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Round:
    """What one stage adds to lines that go on over several: (n,) numbers over (n,) steps or epochs."""

    name: str
    x: np.ndarray
    values: Mapping[str, np.ndarray]


def training(name: str, title: str, rounds: Sequence[Round]) -> Markup:
    """Loss and learning rate over steps. `values` of a round: loss, lr."""

    def draw(figure: Figure, narrow: bool) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
        _mark_rounds(top, rounds, named=True)
        _mark_rounds(bottom, rounds, named=False)
        count = sum(len(one.x) for one in rounds)
        group = -(-count // MOST)
        for one in rounds:
            x, loss, lr = (_thinned(values, group) for values in (one.x, one.values["loss"], one.values["lr"]))
            top.plot(x, loss, color=SERIES[0], alpha=0.35, linewidth=1, **_points(x))
            top.plot(x, _median(loss, count // group // 40), color=SERIES[0], linewidth=2)
            bottom.plot(x, lr, color=SERIES[1], linewidth=2, **_points(x))
        rates = np.concatenate([one.values["lr"] for one in rounds])
        if rates.min() > 0 and rates.max() > 20 * rates.min():
            bottom.set_yscale("log")
            bottom.set_ylim(rates.min() / 2, rates.max() * 2)
            bottom.yaxis.set_minor_locator(NullLocator())
            bottom.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        top.set_ylabel("loss")
        bottom.set_ylabel("learning rate" if not narrow else "lr")
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))

    return _both(name, title, (1000, 400), (340, 320), draw)


def scores(name: str, title: str, rounds: Sequence[Round]) -> Markup:
    """Validation numbers over epochs, -1 for none; `values` have one order in all rounds."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        _mark_rounds(axes, rounds, named=True)
        for number, key in enumerate(rounds[0].values):
            x = np.concatenate([one.x for one in rounds])
            y = np.concatenate([one.values[key] for one in rounds])
            _line(axes, number, x, np.where(y < 0, np.nan, y), **_points(x, 40))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True))

    return _both(name, title, (1000, 300), (340, 260), draw)


def precision_recall(name: str, title: str, recall: np.ndarray, means: np.ndarray, classes: np.ndarray) -> Markup:
    """Precision over recall (R,): means (k, R) over the classes, and of the classes (C, R) thin lines or BANDS."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        if len(classes) > LINES:
            for quantiles, colour in BANDS.items():
                axes.fill_between(recall, *np.quantile(classes, quantiles, axis=0), color=colour, linewidth=0)
        for row in classes if len(classes) <= LINES else ():
            axes.plot(recall, row, color=MUTED, linewidth=0.8, alpha=0.5 if len(classes) < 20 else 0.25)
        for number, row in enumerate(means):
            _line(axes, number, recall, row)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")

    return _both(name, title, (640, 420), (340, 300), draw)


def legend(place: int, name: str) -> dict[str, str]:
    """What the template draws beside a chart for its series number `place`."""
    return {"name": name, "colour": f"--c{place + 1}", "dashes": DASHES[place], "width": "2.5"}


def _line(axes: Axes, number: int, x: np.ndarray, y: np.ndarray, **how: Any) -> None:
    dashes = [float(length) / 2 for length in DASHES[number].split()]  # matplotlib's are in line widths
    axes.plot(x, y, color=SERIES[number], linewidth=2, linestyle=(0, tuple(dashes)) if dashes else "-", **how)


def _mark_rounds(axes: Axes, rounds: Sequence[Round], named: bool) -> None:
    """A band for every second round, a name at the top of each that is wide enough."""
    if len(rounds) < 2:
        return
    ends = [float(one.x[-1]) for one in rounds]
    starts = [float(rounds[0].x[0]), *ends[:-1]]
    for number, (one, start, end) in enumerate(zip(rounds, starts, ends, strict=True)):
        if number % 2:
            axes.axvspan(start, end, color=BAND, linewidth=0)
        if number:
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        if named and end - start > 0.05 * (ends[-1] - starts[0]):
            place: dict[str, Any] = {
                "xycoords": axes.get_xaxis_transform(),
                "textcoords": "offset points",
                "va": "bottom",
            }
            axes.annotate(one.name, (start, 1), xytext=(2, 4), color=INK, fontweight="bold", **place)
    edge = 0.01 * (ends[-1] - starts[0])
    axes.set_xlim(starts[0] - edge, ends[-1] + edge)


def _points(x: np.ndarray, few: int = 2) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(x) <= few else {}


def _thinned(values: np.ndarray, size: int) -> np.ndarray:
    """Averages of `size` neighbours, the last ones in a shorter group."""
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])


def _median(values: np.ndarray, half: int) -> np.ndarray:
    """The running median over `half` values to each side."""
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _both(
    name: str, title: str, wide: tuple[int, int], narrow: tuple[int, int], draw: Callable[[Figure, bool], None]
) -> Markup:
    return Markup("\n").join(
        _svg(f"{name}-{kind}", title, size, kind == "narrow", draw)
        for kind, size in (("wide", wide), ("narrow", narrow))
    )


def _svg(name: str, title: str, size: tuple[int, int], narrow: bool, draw: Callable[[Figure, bool], None]) -> Markup:
    """One chart whose units are the page's pixels at its natural width."""
    with matplotlib.rc_context(SETTINGS | {"font.size": 11 if narrow else 13}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure, narrow)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)  # several charts are in one page
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    head = f'<svg class="chart {name.rpartition("-")[2]}" role="img" viewBox="0 0 {size[0]} {size[1]}"'
    head += f' xmlns:xlink="http://www.w3.org/1999/xlink"><title>{escape(title)}</title>'
    return Markup(head + text.partition(">")[2])
