"""The report's pictures, as inline SVG that takes its ink from the page and is the same bytes for the same run."""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fedray.report.compare import AXES, Curve

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Okabe & Ito, "Color Universal Design" (2008), without black and yellow, which vanish on a dark or a light page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c")
DASHES = ((0.0, ()), (0.0, (5.0, 2.0)), (0.0, (1.5, 1.5)), (0.0, (6.0, 2.0, 1.5, 2.0)))  # when the colours run out
AXIS_TITLES = {
    "rounds": "round",
    "megabytes": "megabytes sent, up and down",
    "seconds": "seconds",
    "virtual": "virtual seconds",
}

_INK, _GRID = "#010203", "#040506"  # stand-ins that become the page's own colours in the SVG
_MAX_POINTS = 2400  # of all lines in one plot together
_MAX_BARS = 120  # stacks in the picture of where the time went
_FEW_CLIENTS = 60  # up to here each client has its place
_MAX_CLIENTS = 300  # columns in the picture of the partition
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "fedray",
    "text.parse_math": False,  # a run may be named a$b$c
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "image.interpolation": "none",  # one pixel a cell; the page says that cells have sharp edges
    "image.composite_image": False,
}


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults and the above, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def line_style(index: int) -> tuple[str, tuple[float, tuple[float, ...]]]:
    """Colour and dashes of the line ``index``: 28 that can be told apart."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


@_style()
def curves_svg(curves: Sequence[Curve], axis: str, title: str, styles: Sequence[int] | None = None) -> str:
    """The curves against one of ``AXES``; the line in style ``styles[i]`` is the i-th curve.

    Losses that span more than a factor of 50 get a logarithmic axis; values that are not finite leave a gap. Megabytes
    get one if a run sends 50 times as many as another; what was measured before anything was sent has no place on it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; it must be one of {', '.join(AXES)}")
    figure = Figure(figsize=(3.9, 2.5))
    ax = figure.add_axes((0.125, 0.18, 0.86, 0.72))  # a computed layout would take as long as the picture
    ends = [end for curve in curves if (end := float(curve.x[axis].max(initial=0.0))) > 0]
    apart = axis == "megabytes" and bool(ends) and max(ends) > 50 * min(ends)
    for index, curve in zip(styles if styles is not None else range(len(curves)), curves, strict=True):
        colour, dashes = line_style(index)
        y = np.where(np.isfinite(curve.y), curve.y, np.nan)
        rows = thin(y, max(20, _MAX_POINTS // len(curves)))
        rows = rows[curve.x[axis][rows] > 0] if apart else rows
        x = curve.x[axis][rows]
        marker = "o" if len(rows) <= 12 else None  # a lone point draws no line
        ax.plot(x, y[rows], color=colour, linestyle=dashes, marker=marker, markersize=3)
        if curve.low is not None and curve.high is not None:
            ax.fill_between(x, curve.low[rows], curve.high[rows], color=colour, alpha=0.18, linewidth=0)
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    if "loss" in title and values.size and values.min() > 0 and values.max() > 50 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(title, color=_INK)
    ax.set_xlabel(AXIS_TITLES[axis])
    first, last = (bound([bound(curve.x[axis]) for curve in curves]) for bound in (min, max))
    if apart:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    elif last > first:  # else of rounds without a finite value nothing would be seen
        ax.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
    else:
        ax.set_xticks([first])
    if axis == "rounds" and last > first:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    return _svg(figure, f"{title} against {AXIS_TITLES[axis]}")


@_style()
def shares_svg(rounds: np.ndarray, parts: Mapping[str, np.ndarray], unit: str) -> str:
    """What each round's total consists of, stacked: the parts, shape (rounds,) each, from the first at the bottom."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11.6, 3.2))
    ax = figure.add_axes((0.055, 0.15, 0.82, 0.77))
    runs = np.array_split(np.arange(len(rounds)), min(len(rounds), _MAX_BARS))  # of many rounds, means over stretches
    edges = np.array([rounds[run[0]] for run in runs]) - 0.5
    below = np.zeros(len(runs))
    for index, (name, values) in enumerate(parts.items()):
        height = np.array([values[run].mean() for run in runs])
        width = [rounds[run[-1]] - rounds[run[0]] + 1 for run in runs]
        ax.bar(edges, height, width, below, align="edge", color=COLOURS[index % len(COLOURS)], label=name, linewidth=0)
        below += height
    ax.set_xlim(edges[0], rounds[-1] + 0.5)
    ax.set_xlabel("round")
    ax.set_ylabel(unit)
    ax.grid(axis="x", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, labelcolor=_INK, reverse=True)
    return _svg(figure, f"{unit} by round: {', '.join(parts)}")


@_style()
def partition_svg(label_counts: np.ndarray, classes: Sequence[str]) -> str:
    """How many examples each client holds, above how many of each class: clients to the right, classes downwards."""
    many = len(label_counts) > _FEW_CLIENTS
    order = np.arange(len(label_counts))
    if many:  # by main class and its share: a skew of labels is a staircase, and its absence an even grey
        shares = label_counts / np.maximum(label_counts.sum(axis=1, keepdims=True), 1)
        order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
    order = order[np.unique(np.linspace(0, len(order) - 1, _MAX_CLIENTS).astype(int))]
    counts = label_counts[order]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.6, 4.4), layout="constrained")
    sizes, ax = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.4])
    sizes.bar(np.arange(len(counts)), counts.sum(axis=1), width=1.0 if many else 0.8, color=COLOURS[0])
    sizes.set_ylabel("examples")
    sizes.grid(axis="x", visible=False)
    image = ax.imshow(np.sqrt(counts.T), aspect="auto", cmap=_shades())
    _class_ticks(ax.yaxis, classes, counts.shape[1], most=15)
    ax.grid(visible=False)
    bar = figure.colorbar(image, ax=[sizes, ax], aspect=30, pad=0.015, label="examples of a class")
    bar.outline.set_visible(False)
    most = float(counts.max())
    ticks = sorted({0, *(int(most * part) for part in (0.05, 0.25, 1.0))})
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[str(tick) for tick in ticks])
    if many:
        shown = f"{len(order)} of " if len(order) < len(label_counts) else ""
        ax.set_xticks([])
        ax.set_xlabel(f"{shown}{len(label_counts):,} clients, by their main class")
    else:
        ax.set_xticks(order[:: -(-len(order) // 25)])
        ax.set_xlabel("client")
    return _svg(figure, "examples of each class on each client")


@_style()
def confusion_svg(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """The confusion matrix, shaded by the share of the true class (row)."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = len(confusion)
    side = min(7.0, 1.8 + 0.34 * size)
    figure = Figure(figsize=(side, side), layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(shares, cmap=_shades(), vmin=0, vmax=1)
    _class_ticks(ax.yaxis, classes, size, most=25)
    _class_ticks(ax.xaxis, classes, size, most=25)
    ax.tick_params(axis="x", rotation=90 if max(map(len, classes), default=0) > 3 else 0)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.grid(visible=False)
    if size <= 20:
        for row, column in np.argwhere(confusion > 0):
            ink = "#ffffff" if shares[row, column] > 0.5 else _INK
            ax.text(column, row, str(confusion[row, column]), ha="center", va="center", color=ink, fontsize=7)
    return _svg(figure, "confusion matrix")


@_style()
def roc_svg(fpr: np.ndarray, tpr: np.ndarray) -> str:
    """An attack's ROC curve on logarithmic axes, which show low false-positive rates; chance is dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 3.4))
    ax = figure.add_axes((0.16, 0.15, 0.8, 0.8))
    rates = fpr[fpr > 0]
    least = float(rates.min()) / 2 if rates.size else 1e-3
    ax.plot([least, 1], [least, 1], color=COLOURS[-1], linestyle=DASHES[1], linewidth=1)
    ax.plot(np.maximum(fpr, least), np.maximum(tpr, least), color=COLOURS[0], drawstyle="steps-post")
    ax.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    ax.set_xlabel("false-positive rate")
    ax.set_ylabel("true-positive rate")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    return _svg(figure, "ROC curve on logarithmic axes")


@_style()
def histograms_svg(values: Mapping[str, np.ndarray], label: str) -> str:
    """How values are distributed: for each name, the share in each of 40 common intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 2.5))
    ax = figure.add_axes((0.14, 0.18, 0.84, 0.78))
    edges = np.linspace(0, max(float(found.max()) for found in values.values()) or 1, 41)
    for index, found in enumerate(values.values()):
        colour, dashes = line_style(index)
        share = np.histogram(found, edges)[0] / len(found)
        ax.stairs(share, edges, color=colour, linestyle=dashes, linewidth=1.6)
    ax.set_xlabel(label)
    ax.set_ylabel("share")
    return _svg(figure, f"distributions of {label}: {', '.join(values)}")


def thin(y: np.ndarray, limit: int) -> np.ndarray:
    """The rows of at most about ``limit`` values that keep the shape: the ends, and each stretch's lowest and highest.

    >>> thin(np.array([0.0, 1.0, 9.0, 1.0, 0.0, 1.0, 2.0, 1.0]), 6).tolist()
    [0, 2, 4, 6, 7]
    """
    if len(y) <= limit:
        return np.arange(len(y))
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), max(1, limit // 2 - 1)):
        known = stretch[np.isfinite(y[stretch])]
        kept |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])} if len(known) else {int(stretch[0])}
    return np.array(sorted(kept))


def _class_ticks(axis: "Axis", classes: Sequence[str], size: int, most: int) -> None:
    """Name the classes, or every so many of them where there is no room for all."""
    shown = range(0, size, -(-size // most))
    axis.set_ticks(shown, [_clip(classes[index]) if index < len(classes) else str(index) for index in shown])
    axis.set_tick_params(length=0)


def _clip(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _shades() -> "Colormap":
    """From clear to dark blue, so that nothing is the page's colour on a light and on a dark page."""
    from matplotlib.colors import LinearSegmentedColormap

    red, green, blue = (int(COLOURS[0][at : at + 2], 16) / 255 for at in (1, 3, 5))
    return LinearSegmentedColormap.from_list("shades", [(red, green, blue, 0.03), (red, green, blue, 1.0)])


def _svg(figure: "Figure", description: str) -> str:
    """The figure as an ``<svg>`` element: no prologue, no date, no size but its proportions, ink from the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names that nothing refers to, and that recur in the next picture
    text = re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a hundredth of a point
    text = re.sub(r"\n\s*", "\n", text)
    for stand_in, colour in ((_INK, "currentColor"), (_GRID, "var(--grid)")):
        text = text.replace(stand_in, colour)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
