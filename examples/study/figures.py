"""The pictures of RESULTS.md: small SVGs, the same bytes for the same results, on any background."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from examples.study.compare import Found, gain
from examples.study.config import (
    ADAGRAD,
    AFTER,
    CLIPPED,
    FREQUENCY,
    OWN_WEIGHT,
    ROWWISE,
    SGD,
    STREAM,
)
from examples.study.sweep import lr_at
from examples.study.verdict import Settings

GREY = "#808080"  # legible on white and on black
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, the reader's font
    "svg.hashsalt": "study",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    ),
}
COLOURS = {
    FREQUENCY.label: "#d55e00",
    ROWWISE.label: "#0072b2",
    CLIPPED.label: "#009e73",
    ADAGRAD.label: "#cc79a7",
    SGD.label: GREY,
}
NAMES = {CLIPPED.label: "row-wise Adagrad, own square weighted", FREQUENCY.label: "FrequencySGD"}
MARKS = "os^Dv"


def draw(settings: Settings, folder: Path) -> list[str]:
    """Writes the pictures for which there are results; returns their names."""
    matplotlib.use("Agg")  # a file, no window
    ours = {name: arms for name, arms in settings.items() if FREQUENCY.label in arms}
    streams = {name: arms for name, arms in ours.items() if STREAM in arms[ROWWISE.label].best}
    epochs = {name: arms for name, arms in ours.items() if "epoch 2" in arms[ROWWISE.label].best}
    pictures: dict[str, tuple[Callable[[Any, Settings], None], Settings]] = {
        "differences": (_differences, ours),
        "lr": (_panels(_by_lr, "lr", "AUC"), ours),
        "epochs": (_panels(_by_epoch, "epoch", "AUC"), epochs),
        "stream": (_panels(_along, "share of the stream", "AUC less row-wise Adagrad's"), streams),
        "rates": (_rates, {name: arms for name, arms in ours.items() if _squares(arms)}),
    }
    with matplotlib.rc_context(STYLE):
        from matplotlib import pyplot

        for name, (paint, shown) in pictures.items():
            if shown:
                figure = pyplot.figure(layout="constrained")
                paint(figure, shown)
                path = folder / f"{name}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
                pyplot.close(figure)
    return [name for name, (_, shown) in pictures.items() if shown]


def _differences(figure: Any, settings: Settings) -> None:
    """One row a task: a mark a measure, with its standard error."""
    figure.set_size_inches(7.5, 1 + 0.3 * len(settings))
    panel = figure.subplots()
    marks: dict[str, Any] = {}
    for row, arms in enumerate(settings.values()):
        measures = list(arms[ROWWISE.label].best)
        for place, measure in enumerate(measures):
            difference = gain(arms, measure)
            marks[measure] = panel.errorbar(
                difference.mean,
                row + 0.2 * (place - (len(measures) - 1) / 2),
                xerr=difference.error,
                fmt=MARKS[place],
                markersize=4,
                color=("#56b4e9", "#009e73", "#d55e00")[place] if len(measures) < 4 else GREY,
                markerfacecolor="none" if measure in (STREAM, AFTER) else None,
            )
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_yticks(range(len(settings)), list(settings))
    panel.invert_yaxis()
    panel.grid(axis="x")
    panel.set_xlabel("AUC less that of row-wise Adagrad, each at its best lr (right: better)")
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=3)


def _panels(
    line: Callable[..., tuple[Sequence[float], Sequence[float]] | None], x: str, y: str
) -> Any:
    """A picture with a panel a setting, and in it a line an arm."""

    def paint(figure: Any, settings: Settings) -> None:
        columns = 3
        rows = -(-len(settings) // columns)
        figure.set_size_inches(9, 0.6 + 2.1 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flat
        lines: dict[str, Any] = {}
        for panel in list(panels)[len(settings) :]:
            panel.axis("off")
        for panel, (name, arms) in zip(panels, settings.items(), strict=False):
            highest = -math.inf
            for label, colour in COLOURS.items():
                if label in arms and (points := line(arms, label)):
                    highest = max(highest, *points[1])
                    (lines[NAMES.get(label, label)],) = panel.plot(*points, ".-", color=colour)
            panel.set_title(name, fontsize="medium")
            panel.set(xlabel=x, ylabel=y)
            if line is _by_lr:
                panel.set(xscale="log", ylim=(highest - 0.03, highest + 0.003))
            panel.grid()
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)

    return paint


def _by_lr(arms: Mapping[str, Found], label: str) -> tuple[Sequence[float], Sequence[float]]:
    """By the first measure, with the first seed."""
    found = arms[label]
    measure = found.experiment.measures[0]
    tried = sorted(found.results)
    return [lr_at(e) for e in tried], [found.at(e, measure)[0] for e in tried]


def _by_epoch(arms: Mapping[str, Found], label: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean over the seeds, each epoch's at its own best lr."""
    found = arms[label]
    means = [statistics.fmean(found.figures(measure)) for measure in found.best]
    return range(1, len(means) + 1), means


def _along(arms: Mapping[str, Found], label: str) -> tuple[Sequence[float], Sequence[float]] | None:
    """Less row-wise Adagrad, mean over the seeds; nothing for row-wise Adagrad itself."""
    if label == ROWWISE.label:
        return None
    curves = []
    for name in (label, ROWWISE.label):
        found = arms[name]
        runs = found.results[found.best[STREAM]]
        curves.append(np.array([[auc for _, auc in run["curve"]] for run in runs]))
    steps = [step for step, _ in runs[0]["curve"]]
    difference = (curves[0] - curves[1]).mean(axis=0)
    return [step / steps[-1] for step in steps], difference.tolist()


def _squares(arms: Mapping[str, Found]) -> list[list[float]]:
    """What row-wise Adagrad summed up by count, see `train`, at its best lr for one epoch."""
    found = arms[ROWWISE.label]
    best = found.best[found.experiment.measures[0]]
    lines: list[list[float]] = found.results[best][0].get("squares", [])
    return lines


def _rates(figure: Any, settings: Settings) -> None:
    """Of the first setting: the rate by count; and for any: how far a row moves in one step."""
    figure.set_size_inches(9, 3.2)
    rate, move = figure.subplots(1, 2)
    name, arms = next(iter(settings.items()))
    count, low, median, high, predicted = np.array(_squares(arms)).T
    ours, theirs = COLOURS[FREQUENCY.label], COLOURS[ROWWISE.label]
    bars = np.sqrt(1 / np.array([median, high, low]))
    errors = np.abs(bars[1:] - bars[0])
    rate.errorbar(count, bars[0], yerr=errors, fmt=".-", color=theirs, label="RowWiseAdagrad")
    rate.plot(count, np.sqrt(1 / predicted), ".-", color=ours, label="FrequencySGD")
    rate.set(xscale="log", yscale="log", xlabel="occurrences of the row", ylabel="rate / lr")
    rate.set_title(f"{name}: rows of the largest table", fontsize="medium")
    ratio = np.geomspace(0.01, 100, 60)  # mean(g^2) of the step beside the past squares
    move.plot(ratio, np.sqrt(ratio / (1 + ratio)), color=theirs)
    move.plot(ratio, np.sqrt(2 * ratio / (1 + OWN_WEIGHT * ratio)), color=ours)
    move.set(xscale="log", ylim=(0, 1.05), ylabel="move / lr")
    move.set(xlabel="square of the gradient / sum of the past ones")
    move.set_title("how far a row moves in one step", fontsize="medium")
    for panel in (rate, move):
        panel.grid()
    rate.legend()
