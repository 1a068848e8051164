"""The pictures of RESULTS.md."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.common.pictures import GREY, picture
from benchmarks.study.compare import Known, curve
from benchmarks.study.config import OURS, ROWWISE, TUNED, Setting

COLOURS: Final = {OURS.label: "#d55e00", ROWWISE.label: "#0072b2", TUNED.label: "#009e73"}
WHEN: Final = ("in the stream (epoch 1)", "after it (epoch 2)")
DIFFERENCES: Final = (
    "AUC of FrequencySGD less that of row-wise Adagrad, and less that of row-wise Adagrad with eps "
    "tuned, with 95 % intervals, a row a task"
)


def draw(known: Known, folder: Path) -> dict[str, str]:
    """Writes the pictures; returns the names and alt texts of those made."""
    drawn = {"differences": DIFFERENCES}
    with picture(folder / "differences.png") as figure:
        _differences(figure, known)
    streams = [s for s in known.settings if not s.shuffled and _finished(known, s)]
    if streams:
        drawn["stream"] = "AUC of all predictions so far, less row-wise Adagrad's, a panel a task"
        with picture(folder / "stream.png") as figure:
            for panel, setting in _panels(figure, streams):
                _stream(panel, known, setting)
            lines = panel.get_legend_handles_labels()
            figure.legend(*lines, loc="outside lower center", ncols=2)
    return drawn


def _differences(figure: Any, known: Known) -> None:
    """One row a setting; round: the first measure, square: the second."""
    figure.set_size_inches(8.5, 1.2 + 0.42 * len(known.settings))
    panel = figure.subplots()
    marks: dict[str, Any] = {}
    for row, setting in enumerate(known.settings):
        for place, measure in enumerate(setting.measures):
            for shift, other in ((-0.09, ROWWISE), (0.09, TUNED)):
                gain = known.gain(setting, measure, theirs=other)
                if gain is None:
                    continue
                y = row + 0.44 * (place - 0.5) + shift
                bounds = [[gain.mean - gain.low], [gain.high - gain.mean]]
                bar = panel.errorbar(
                    gain.mean,
                    y,
                    xerr=None if np.isnan(bounds).any() else np.maximum(bounds, 0),
                    fmt="os"[place],
                    markersize=4,
                    color=COLOURS[other.label],
                    markerfacecolor=COLOURS[other.label] if place == 0 else "none",
                )
                marks[f"less {other.label}, {WHEN[place]}"] = bar
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_yticks(range(len(known.settings)), [setting.name for setting in known.settings])
    panel.invert_yaxis()
    panel.set_xlabel("AUC of FrequencySGD less AUC of another (right: FrequencySGD is better)")
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=2)


def _finished(known: Known, setting: Setting) -> bool:
    runs = [run for arm in (OURS, ROWWISE) for run in known.runs(setting, arm)]
    return bool(known.runs(setting, OURS)) and all(run["measures"] for run in runs)


def _panels(figure: Any, settings: list[Setting]) -> list[tuple[Any, Setting]]:
    columns, rows = min(3, len(settings)), -(-len(settings) // 3)
    figure.set_size_inches(3 * columns, 2.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(settings) :]:
        panel.axis("off")
    return list(zip(panels, settings, strict=False))


def _stream(panel: Any, known: Known, setting: Setting) -> None:
    theirs = np.mean([curve(run) for run in known.runs(setting, ROWWISE)], axis=0)
    for arm in (OURS, TUNED):
        runs = known.runs(setting, arm)
        if runs and all(run["measures"] for run in runs):
            gain = np.mean([curve(run) for run in runs], axis=0) - theirs
            share = np.arange(1, len(gain) + 1) / len(gain)
            late = share > 0.1  # before, so few samples say nothing
            panel.plot(share[late], gain[late], color=COLOURS[arm.label], label=arm.label)
    panel.axhline(0, color=GREY, linewidth=1)
    panel.set(xlabel="share of the stream", title=setting.name)
