"""The pictures of RESULTS.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import GREY, picture
from benchmarks.study.compare import Arms, Settings, gain
from benchmarks.study.config import ADAGRAD, CLIPPED, FREQUENCY, OWN_WEIGHT, QUICK, ROWWISE, STREAM
from benchmarks.study.sweep import lr_at

ARMS = {  # label -> name and colour
    FREQUENCY.label: ("FrequencySGD", "#d55e00"),
    ROWWISE.label: ("row-wise Adagrad", "#0072b2"),
    CLIPPED.label: ("row-wise Adagrad, own square weighted", "#009e73"),
    ADAGRAD.label: ("Adagrad", "#cc79a7"),
}
Points = tuple[Sequence[float], Sequence[float]]


def draw(settings: Settings, folder: Path) -> dict[str, str]:
    """Writes pictures of the quick form's tasks; returns the names and alt texts of those made."""
    drawn = {}
    known = {experiment.setting: settings.get(experiment.setting, {}) for experiment in QUICK}
    ours = {name: arms for name, arms in known.items() if FREQUENCY.label in arms}
    for name, (alt, measure, paint) in PICTURES.items():
        # A picture of no measure is of all: "" is in every name.
        has = {e: measure in " ".join(arms[FREQUENCY.label].best) for e, arms in ours.items()}
        if shown := {e: arms for e, arms in ours.items() if has[e]}:
            with picture(folder / f"{name}.png") as figure:
                paint(figure, shown)
            drawn[name] = alt
    return drawn


def _differences(figure: Any, settings: Settings) -> None:
    """One row a task, a mark a measure, hollow in streams."""
    figure.set_size_inches(7.5, 1 + 0.3 * len(settings))
    panel = figure.subplots()
    marks: dict[str, Any] = {}
    for row, arms in enumerate(settings.values()):
        measures = arms[ROWWISE.label].experiment.measures
        for place, measure in enumerate(measures):
            difference = gain(arms, measure)
            assert difference is not None
            y, marker = row + 0.22 * (place - (len(measures) - 1) / 2), "os^"[place]
            bar = panel.errorbar(
                difference.mean, y, xerr=difference.error, fmt=marker, color=f"C{place}"
            )
            bar[0].set(markersize=4, markerfacecolor="none" if STREAM in measures else None)
            marks[measure] = bar
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_yticks(range(len(settings)), list(settings))
    panel.invert_yaxis()
    panel.set_xlabel("AUC less that of row-wise Adagrad, each at its best lr (right: better)")
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=5)


def _panels(line: Callable[[Arms, str], Points], **axes: Any) -> Callable[[Any, Settings], None]:
    """A picture with a panel a setting, and in it a line an arm."""

    def paint(figure: Any, settings: Settings) -> None:
        columns, rows = 3, -(-len(settings) // 3)
        figure.set_size_inches(9, 0.6 + 2.1 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        lines: dict[str, Any] = {}
        for panel in panels[len(settings) :]:
            panel.axis("off")
        for panel, (title, arms) in zip(panels, settings.items(), strict=False):
            highest = 0.0
            for label, (name, colour) in ARMS.items():
                if label in arms:
                    x, y = line(arms, label)
                    highest = max(highest, *y)
                    (lines[name],) = panel.plot(x, y, ".-", color=colour)
            panel.set(title=title, **axes)
            panel.set_ylim(bottom=max(panel.get_ylim()[0], highest - 0.04))
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)

    return paint


def _by_lr(arms: Arms, label: str) -> Points:
    """By the first measure, mean over the seeds."""
    found = arms[label]
    means = [float(np.mean(found.at(e, found.experiment.measures[0]))) for e in found.results]
    return [lr_at(exponent) for exponent in found.results], means


def _by_epoch(arms: Arms, label: str) -> Points:
    """Mean over the seeds, each epoch's at its own best lr."""
    means = [arms[label].mean(measure) for measure in arms[label].best]
    return range(1, len(means) + 1), means


def _along(arms: Arms, label: str) -> Points:
    """Less row-wise Adagrad in the same part of the stream, mean over the seeds."""
    ours, theirs = (
        [run["curve"] for run in found.results[found.best[STREAM]]]
        for found in (arms[label], arms[ROWWISE.label])
    )
    x = [step / ours[0][-1][0] for step, _ in ours[0]]
    means = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    return x, means[:, 1].tolist()


def _rates(figure: Any, settings: Settings) -> None:
    """The rate by count in the first setting, see `train`; a row's move in a step, by formula."""
    figure.set_size_inches(9, 3.2)
    rate, move = figure.subplots(1, 2)
    name, arms = next(iter(settings.items()))
    found = arms[ROWWISE.label]
    squares = found.results[found.best["epoch 1"]][0]["squares"]
    count, low, median, high, predicted = np.array(squares).T
    (our_name, ours), (their_name, theirs) = list(ARMS.values())[:2]
    rate.fill_between(count, high**-0.5, low**-0.5, color=theirs, alpha=0.2, linewidth=0)
    rate.plot(count, median**-0.5, ".-", color=theirs, label=f"{their_name}: median, 80 % of rows")
    rate.plot(count, (predicted / 2) ** -0.5, ".-", color=ours, label=our_name)
    rate.set(xscale="log", yscale="log", xlabel="occurrences of the row", ylabel="rate / lr")
    rate.set_title(f"{name}, largest table")
    rate.legend()
    ratio = np.geomspace(0.01, 100, 60)
    move.plot(ratio, np.sqrt(ratio / (1 + ratio)), color=theirs)
    move.plot(ratio, np.sqrt(2 * ratio / (1 + OWN_WEIGHT * ratio)), color=ours)
    move.set(xscale="log", title="how far a row moves in one step")
    move.set(xlabel="square of the gradient / sum of the past ones", ylabel="move / lr")


_lr = _panels(_by_lr, xscale="log", xlabel="lr", ylabel="AUC")
_epochs = _panels(_by_epoch, xlabel="epoch", ylabel="AUC", xticks=(1, 2, 3))
_stream = _panels(_along, xlabel="share of the stream", ylabel="difference")
DIFFERENCES = "AUC of FrequencySGD less that of row-wise Adagrad, with error bars, a row a task"
RATES = """\
Left: the rate of a row by its count, a straight line with FrequencySGD. Right: how far a row moves
in a step: at most lr with row-wise Adagrad, at most lr sqrt(2 / own_weight) with FrequencySGD"""
PICTURES: dict[str, tuple[str, str, Callable[[Any, Settings], None]]] = {
    # Alt text, the measure that a setting must have, what paints these settings.
    "differences": (DIFFERENCES, "", _differences),
    "lr": ("AUC by lr, a panel a task", "", _lr),
    "epochs": ("AUC after each epoch, a panel a task", "epoch 2", _epochs),
    "stream": ("AUC along each stream, less that of row-wise Adagrad", STREAM, _stream),
    "rates": (RATES, "epoch 1", _rates),
}
