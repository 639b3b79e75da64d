"""Pictures as PNG files, readable at the width of a README."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from djinn_fx.benchmarks.tables import Picture, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: Colours that differ in lightness too, on white.
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5fd3", "#c77d0a", "#4f5d75")

#: Fonts and lines large enough to be read at half size.
STYLE = {
    "font.size": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.5,
    "lines.markersize": 7,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}


def drawable() -> str | None:
    """Why no pictures can be drawn here, or None."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'djinn-fx[bench]'"
    return None


def draw(picture: Picture, folder: Path, prefix: str = "") -> Path:
    """Draw a picture; returns the path of its PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = sum(len(points) for points in picture.series.values()) if picture.kind == "bars" else 0
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = pyplot.subplots(figsize=(11, max(3.0, 1.6 + 0.55 * bars) if bars else 5.5), layout="constrained")
        (_bars if picture.kind == "bars" else _lines)(axes, picture)
        figure.suptitle(picture.title, x=0.01, ha="left", fontsize=18, fontweight="bold")
        axes.set_xlabel(picture.x)
        axes.set_ylabel(picture.y)
        path = folder / f"{prefix}{picture.name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
    return path


def _lines(axes: Axes, picture: Picture) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (name, points) in enumerate(picture.series.items()):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", color=COLOURS[index % len(COLOURS)], label=name)
    if "x" in picture.log:
        axes.set_xscale("log", base=2)
        every = sorted({x for points in picture.series.values() for x, _ in points})
        axes.set_xticks(every, [number(float(x)) for x in every])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "y" in picture.log:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
    if len(picture.series) > 1:
        axes.legend(frameon=False)


def _bars(axes: Axes, picture: Picture) -> None:
    entries: list[tuple[str, float, str]] = []
    for index, points in enumerate(picture.series.values()):
        entries += [(str(label), value, COLOURS[index % len(COLOURS)]) for label, value in points]
    places = range(len(entries))
    drawn: Any = axes.barh(places, [value for _, value, _ in entries], color=[colour for *_, colour in entries])
    plain = ["" if label in picture.spans else number(value) for label, value, _ in entries]
    axes.bar_label(drawn, labels=plain, padding=5)
    for place, (label, value, _) in enumerate(entries):
        if label in picture.spans:  # the number stands behind the interval, not in it
            low, high = picture.spans[label]
            axes.plot((low, high), (place, place), color="#222222", linewidth=1.8, marker="|", markersize=9)
            end = (max(value, high, 0.0), place)
            axes.annotate(number(value), end, xytext=(7, 0), textcoords="offset points", va="center", fontsize=14)
    axes.set_yticks(places, [label for label, *_ in entries], fontsize=12)
    axes.invert_yaxis()
    for name, value in picture.floor.items():
        axes.axvline(value, color="#444444", linestyle="--", linewidth=1.8)
        axes.annotate(
            name, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize=12, color="#444444",
        )  # fmt: skip
    axes.margins(x=0.15)
    axes.grid(True, axis="x", alpha=0.3)


def _plain_ticks(axis: Axis) -> None:
    """Numbers as people write them along a logarithmic axis, few enough to stand beside each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())
