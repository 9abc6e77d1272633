"""plots/: what loraga_report.json says, drawn; PNG files, and the same figures as <svg> for the page."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraga_dist.artifacts.report import Report, TargetReport
from loraga_dist.errors import printable
from loraga_dist.publish.rendering import DASH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#1f2328"
"""Of text and axes in the PNGs; in the page it becomes the text's own colour, so that plots follow light and dark."""
_BAR, _MARK = "#4a86c5", "#e0732e"
_LAYER_COLORS = ("#2f7ed8", "#9b6bcc", "#e0732e")
"""From the first layer to the last: of one lightness, so that lines show on white and on black."""
_WIDTH_INCHES = 5.0  # 480 px: two plots side by side on a desktop, and still legible when a phone shrinks them
_MAX_NUMBERED_COLUMNS = 8
_LEAST_LACKING = 1e-6
"""Less than this is the same to the eye."""
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 8.5,
    "figure.titlesize": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a name is none of TeX's
}

_Grid = dict[str, dict[int | None, list[TargetReport]]]
"""The targets by kind of module and layer; experts of one layer share a place."""


def draw(report: Report, directory: Path) -> list[tuple[str, str]] | None:
    """Write the PNGs; returns <svg> element and caption of each, or None without matplotlib. Raises OSError."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook sets its own for all it starts, and importing fails where that is not
    try:
        import matplotlib
    except ImportError:
        return None
    directory.mkdir()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's own style
        matplotlib.rcParams.update(_STYLE)
        return [(_save(figure, name, directory), caption) for name, figure, caption in _plots(report)]


def _by_kind_and_layer(targets: Mapping[str, TargetReport]) -> _Grid:
    patterns = {name: re.sub(r"(?<![^.])\d+(?![^.])", "*", printable(name)) for name in targets}
    label = _short_names(dict.fromkeys(patterns.values()))
    kinds: _Grid = {}
    for name, target in targets.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        kinds.setdefault(label[patterns[name]], {}).setdefault(layer, []).append(target)
    return kinds


def _layers(grid: _Grid) -> list[int | None]:
    """All layers in order, and None at the end if some target is of no layer."""
    found = {layer for by_layer in grid.values() for layer in by_layer}
    return sorted(found, key=lambda layer: (layer is None, layer))


def _mean(targets: Sequence[TargetReport], field: str) -> float:
    """Of the known values; NaN if there are none."""
    known = [value for target in targets if (value := getattr(target, field)) is not None]
    return sum(known) / len(known) if known else math.nan


def _short_names(patterns: Iterable[str]) -> dict[str, str]:
    """The last part of each name, with only those before it that tell it from others with the same last part."""
    groups: dict[str, list[str]] = {}
    for pattern in patterns:
        groups.setdefault(pattern.rpartition(".")[2], []).append(pattern)
    names = {}
    for last, group in groups.items():
        shared = set.intersection(*(set(pattern.split(".")) for pattern in group)) | {"*"}
        short = [".".join([p for p in pattern.split(".")[:-1] if p not in shared] + [last]) for pattern in group]
        names |= dict(zip(group, short if len(set(short)) == len(group) else group, strict=True))
    return names


def _plots(report: Report) -> Iterator[tuple[str, Figure, str]]:
    """Name, figure and caption of every plot, in the order of the page."""
    grid = _by_kind_and_layer(report.targets)
    if report.scheme.source == "gradient":
        yield (
            "singular_values",
            _spectra(grid),
            "The singular values of each target's gradient, divided by its largest: one line a layer. The steeper, the "
            "less a low rank leaves out.",
        )
    for field, title, is_share, caption in (
        (
            "captured_energy",
            "Captured energy",
            True,
            "The share of the squared gradient in the leading directions that the start uses; darker is less.",
        ),
        (
            "split_half_cosine",
            "Split-half cosine",
            True,
            "How far two halves of the calibration data agree on the gradient; dark asks for more samples.",
        ),
        (
            "offset_ratio",
            "Offset ratio",
            False,
            "‖s B0 A0‖ / ‖W‖, how much of each weight moves into the adapter; dark asks for a smaller scale."
            if report.scheme.changes_base
            else "‖s B0 A0‖ / ‖W‖, how far each weight starts from the original; dark asks for a smaller scale.",
        ),
    ):
        if any(getattr(target, field) is not None for target in report.targets.values()):
            yield field, _heatmap(grid, field, title, is_share=is_share), caption
    yield (
        "memory",
        _memory(report.peak_bytes_per_rank, report.planned_peak_bytes_per_rank),
        "The plan is made from shapes before anything is loaded: weights, the largest block gathered at a time, the "
        "engine's state and activations.",
    )
    yield "seconds", _seconds(report.seconds), f"{report.seconds['total']:.1f} s in all."


def _save(figure: Figure, name: str, directory: Path) -> str:
    """Write the PNG, and return the same figure as an <svg> element for the page."""
    import matplotlib

    text = io.StringIO()
    figure.savefig(directory / f"{name}.png", dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # it is laid out now, which is half of the work
    # ids made from the plot's name: no other plot of the page has them, and the same report gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    _, start, svg = text.getvalue().partition("<svg")  # without XML's head, which HTML does not know
    svg = re.sub(r"<metadata>.*?</metadata>", "", start + svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every figure names its groups alike
    title = escape(figure.get_suptitle())
    return svg.replace(_INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _new_figure(title: str, height_inches: float) -> Figure:
    # without pyplot there is no backend to choose, no window and nothing to close
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    figure.suptitle(title)
    return figure


def _spectra(grid: _Grid) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    num_columns = 2 if len(grid) <= 8 else 3
    num_rows = math.ceil(len(grid) / num_columns)
    figure = _new_figure("Singular values of the gradient", 0.9 + 1.35 * num_rows)
    axes = list(figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flat)
    numbers = [layer for layer in _layers(grid) if layer is not None]
    span = Normalize(min(numbers, default=0), max(numbers, default=1))
    color_of = LinearSegmentedColormap.from_list("layers", _LAYER_COLORS)
    smallest = 1.0
    for axis, (kind, by_layer) in zip(axes, grid.items(), strict=False):
        axis.set_title(_two_lines(kind, 20), loc="left")
        axis.set_yscale("log")
        axis.grid(True)
        for layer, targets in by_layer.items():
            color = _INK if layer is None else color_of(span(layer))
            shares = _mean_spectrum(targets)
            smallest = min([smallest, *(share for share in shares if share > 0)])
            axis.plot(range(1, len(shares) + 1), shares, color=color, linewidth=1, alpha=0.8)
    decades = -math.log10(smallest)
    first = axes[0]  # the others share its scales
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1,)))
    first.yaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    first.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for index, axis in enumerate(axes):
        below = index + num_columns
        axis.tick_params(labelbottom=below >= len(grid))  # the lowest of each column
        if index >= len(grid):
            axis.remove()
    figure.supxlabel("index", fontsize="medium")
    figure.supylabel("relative to the largest", fontsize="medium")
    if len(numbers) > 1:
        bar = figure.colorbar(ScalarMappable(span, color_of), ax=list(figure.axes), label="layer", aspect=40, pad=0.02)
        bar.locator = MaxNLocator(6, integer=True)
    return figure


def _mean_spectrum(targets: Sequence[TargetReport]) -> list[float]:
    """Singular values by the largest of each target, the mean over a layer's experts. Zeros, of a gradient with fewer
    directions than asked for, are none: they have no place on a log scale."""
    spectra = [values for target in targets if (values := target.singular_values) and values[0]]
    columns = zip_longest(*([value / values[0] for value in values] for values in spectra), fillvalue=0.0)
    known = ([share for share in column if share > 0] for column in columns)
    return [sum(shares) / len(shares) if shares else math.nan for shares in known]


def _heatmap(grid: _Grid, field: str, title: str, *, is_share: bool) -> Figure:
    """Shades go by what is lacking, on a logarithmic scale, dark is most: 0.99 and 0.999 are as far apart as 0.9 and
    0.99. is_share: 1 is best and what lacks is the rest; else 0 is best and it is the value itself."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    layers = _layers(grid)
    values = [[_mean(by_layer.get(layer, []), field) for layer in layers] for by_layer in grid.values()]
    lacking = [[max(1 - value if is_share else value, _LEAST_LACKING) for value in row] for row in values]
    known = [value for row in lacking for value in row if not math.isnan(value)]
    # equal values are of one shade, and noise in the last digit does not look like a difference
    least, most = min(known), max(*known, 1.5 * min(known))
    scale = LogNorm(least, most)
    shade = colormaps["viridis_r"]
    figure = _new_figure(title, 1.0 + 0.34 * len(values))
    axis = figure.add_subplot()
    image = axis.imshow(lacking, cmap=shade, norm=scale, aspect="auto", interpolation="nearest")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_yticks(range(len(values)), [_two_lines(kind, 26) for kind in grid])
    step = math.ceil(len(layers) / 10)
    ticks = range(0, len(layers), step)
    axis.set_xticks(ticks, [DASH if layers[tick] is None else str(layers[tick]) for tick in ticks])
    axis.set_xlabel("layer")
    decades = math.log10(most / least)
    bar = figure.colorbar(
        image,
        ax=axis,
        pad=0.02,
        ticks=LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if decades < 0.5 else (1, 2, 5)),
        format=FuncFormatter(lambda lacks, _: f"{1 - lacks if is_share else lacks:.4g}"),
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    if len(layers) <= _MAX_NUMBERED_COLUMNS:
        for row, by_layer in enumerate(grid.values()):
            for column, layer in enumerate(layers):
                value = values[row][column]
                if not math.isnan(value):
                    red, green, blue, _ = shade(scale(lacking[row][column]))
                    color = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize="small")
                elif layer in by_layer:
                    axis.text(column, row, DASH, ha="center", va="center")
    return figure


def _memory(measured_bytes: Sequence[int], planned_bytes: Sequence[int]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    unit, unit_bytes = ("GiB", 2**30) if max(measured_bytes) >= 2**30 else ("MiB", 2**20)
    ranks = range(len(measured_bytes))
    figure = _new_figure("Peak memory per rank", 2.6)
    axis = figure.add_subplot()
    bars = axis.bar(ranks, [peak / unit_bytes for peak in measured_bytes], width=0.6, color=_BAR, label="measured")
    axis.hlines(
        [planned / unit_bytes for planned in planned_bytes],
        [rank - 0.4 for rank in ranks],
        [rank + 0.4 for rank in ranks],
        colors=_MARK,
        linewidth=2.5,
        label="planned",
    )
    if len(ranks) <= _MAX_NUMBERED_COLUMNS:
        axis.bar_label(bars, fmt="%.3g", padding=2)
    axis.set_xlim(-1, len(ranks))
    axis.margins(y=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick < len(ranks)])
    axis.set_xlabel("rank")
    axis.set_ylabel(unit)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _seconds(seconds: Mapping[str, float]) -> Figure:
    phases = {phase: value for phase, value in seconds.items() if phase != "total"}
    phases["other"] = max(0.0, seconds["total"] - sum(phases.values()))
    figure = _new_figure("Seconds per phase", 0.8 + 0.3 * len(phases))
    axis = figure.add_subplot()
    bars = axis.barh(list(phases), list(phases.values()), height=0.6, color=_BAR)
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("seconds")
    return figure


def _two_lines(name: str, max_length: int) -> str:
    """A longer dotted name is broken at the dot nearest its middle."""
    dots = [match.end() for match in re.finditer(r"\.", name)]
    if len(name) <= max_length or not dots:
        return name
    dot = min(dots, key=lambda end: abs(end - len(name) / 2))
    return f"{name[:dot]}\n{name[dot:]}"
