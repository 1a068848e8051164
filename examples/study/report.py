"""The tables and plots of the results: all figures on the test split unless they say otherwise."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from examples.study.config import EXPERIMENTS, FREQUENCY, MAIN, ROWWISE
from examples.study.results import Result, Results
from examples.study.sweep import STEPS_OF_10X, TOLERANCE, WHEN, Sweep, lr_at, mean_auc, sweeps

Table = list[list[str]]
Setting = tuple[str, int]
"""Name of an experiment, and batch size."""


class Found:
    """What is known of one sweep.

    Attributes:
        tried: exponent of lr -> a result a seed.
    """

    def __init__(self, sweep: Sweep, results: Results) -> None:
        self.label = sweep.arm.label
        self.tried = sweep.tried(results)

    def scores(self, when: str) -> dict[int, float]:
        """Mean validation AUC at each exponent."""
        return {exponent: mean_auc(found, when) for exponent, found in self.tried.items()}

    def best(self, when: str) -> int:
        """The exponent with the best validation AUC."""
        scores = self.scores(when)
        return max(scores, key=scores.__getitem__)

    def figures(self, when: str, metric: str, exponent: int) -> list[float]:
        """A test figure a seed; a run that diverged counts as AUC 0.5."""
        points = [WHEN[when](result) for result in self.tried[exponent]]
        return [float(point["test"][metric]) if point else 0.5 for point in points]

    def auc(self, when: str, exponent: int | None = None) -> float:
        """Mean test AUC, at the best lr or at another one."""
        exponent = self.best(when) if exponent is None else exponent
        return statistics.fmean(self.figures(when, "auc", exponent))


def found_by_setting(results: Results) -> dict[Setting, dict[str, Found]]:
    """What is known, by setting and label of the arm."""
    settings: dict[Setting, dict[str, Found]] = {}
    for experiment in (e for chosen in EXPERIMENTS.values() for e in chosen):
        for sweep in sweeps(experiment):
            found = Found(sweep, results)
            if found.tried:
                setting = (experiment.name, sweep.batch_size)
                settings.setdefault(setting, {})[found.label] = found
    return settings


def decades_within(scores: Mapping[int, float], tolerance: float = TOLERANCE) -> float:
    """How many decades of lr around the best score fall short of it by at most `tolerance`.

    Between grid points, half a decade apart, the score is taken to be linear in log lr.
    """
    best = max(scores, key=scores.__getitem__)
    floor = scores[best] - tolerance
    width = 0.0
    for direction in (1, -1):
        here = best
        while (after := here + direction) in scores and scores[after] >= floor:
            here = after
            width += 1
        if after in scores:
            width += (scores[here] - floor) / (scores[here] - scores[after])
    return width / STEPS_OF_10X


def main_table(arms: Mapping[str, Found]) -> Table:
    """Figures of each arm at its own best lr."""
    table = [["optimizer"]]
    for when in WHEN:
        table[0] += [f"lr, {when}", "AUC", "log loss", "AUC, rare"]
    for label, found in arms.items():
        row = [label]
        for when in WHEN:
            best = found.best(when)
            row.append(f"{lr_at(best):g}")
            for metric in ("auc", "log_loss", "rare_auc"):
                row.append(_mean_and_deviation(found.figures(when, metric, best)))
        table.append(row)
    return table


def lr_table(arms: Mapping[str, Found], when: str) -> Table:
    """How much the choice of lr matters."""
    table = [["optimizer", "best lr", "decades within 0.002", "AUC lost at 3x", "at 10x"]]
    for label, found in arms.items():
        best = found.best(when)
        scores = found.scores(when)
        row = [label, f"{lr_at(best):g}", f"{decades_within(scores):.2f}"]
        for steps in (STEPS_OF_10X // 2, STEPS_OF_10X):
            known = best + steps in found.tried
            row.append(f"{found.auc(when) - found.auc(when, best + steps):.4f}" if known else "")
        table.append(row)
    return table


def same_lr_table(settings: Mapping[Setting, Mapping[str, Found]], when: str) -> Table:
    """Test AUC of FrequencySGD and row-wise Adagrad at each lr that any of them was tried at."""
    wanted = (FREQUENCY.label, ROWWISE.label)
    chosen = [
        (setting, label, arms[label])
        for setting, arms in settings.items()
        for label in wanted
        if label in arms
    ]
    exponents = sorted({exponent for _, _, found in chosen for exponent in found.tried})
    table = [["at lr", "batch", "optimizer", *(f"{lr_at(exponent):g}" for exponent in exponents)]]
    for (name, batch_size), label, found in chosen:
        known = [
            f"{found.auc(when, exponent):.4f}" if exponent in found.tried else ""
            for exponent in exponents
        ]
        table.append([name, str(batch_size), label, *known])
    return table


def carry_over_table(settings: Mapping[Setting, Mapping[str, Found]]) -> Table:
    """FrequencySGD at the lr that is best for row-wise Adagrad at the smallest batch size."""
    head = ["RowWiseAdagrad, own best lr", "at this lr", "FrequencySGD at this lr", "behind"]
    table = [["", "batch", "lr", "when", *head]]
    reference: dict[tuple[str, str], int] = {}
    for (name, batch_size), arms in sorted(settings.items()):
        ours, theirs = arms.get(FREQUENCY.label), arms.get(ROWWISE.label)
        if ours is None or theirs is None:
            continue
        for when in _when(name):
            lr = reference.setdefault((name, when), theirs.best(when))
            if lr in ours.tried and lr in theirs.tried:
                best, same, got = theirs.auc(when), theirs.auc(when, lr), ours.auc(when, lr)
                figures = [f"{auc:.4f}" for auc in (best, same, got, best - got)]
                table.append([name, str(batch_size), f"{lr_at(lr):g}", when, *figures])
    return table


def steps_table(arms: Mapping[str, Found]) -> Table:
    """Validation AUC along the way, at the lr that is best after one epoch."""
    table: Table = []
    for label, found in arms.items():
        curve = mean_curve(found.tried[found.best("1 epoch")])
        if not table:
            table.append(["optimizer", *(f"step {step}" for step in curve)])
        table.append([label, *(f"{value:.4f}" for value in curve.values())])
    return table


def mean_curve(results: Sequence[Result]) -> dict[int, float]:
    """Step -> mean validation AUC over the runs."""
    curves = [{p["step"]: float(p["valid"]["auc"]) for p in r["curve"]} for r in results]
    common = [step for step in curves[0] if all(step in curve for curve in curves)]
    return {step: statistics.fmean(curve[step] for curve in curves) for step in common}


def markdown(table: Table) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary_table(settings: Mapping[Setting, Mapping[str, Found]]) -> Table:
    """Test AUC of the main arms, each at its own best lr."""
    table = [["after 1 epoch / the best one", "batch", *(arm.label for arm in MAIN)]]
    for (name, batch_size), arms in settings.items():
        row = [name, str(batch_size)]
        for arm in MAIN:
            found = arms.get(arm.label)
            means = [
                _mean_and_deviation(found.figures(when, "auc", found.best(when)))
                for when in _when(name)
                if found is not None
            ]
            row.append(" / ".join(means))
        table.append(row)
    return table


def lr_summary_table(settings: Mapping[Setting, Mapping[str, Found]]) -> Table:
    """The lines of `lr_table` for FrequencySGD and row-wise Adagrad."""
    table: Table = []
    for (name, batch_size), arms in settings.items():
        head, *rows = lr_table(arms, "1 epoch")
        table = table or [["after 1 epoch", "batch", *head]]
        wanted = (FREQUENCY.label, ROWWISE.label)
        table += [[name, str(batch_size), *row] for row in rows if row[0] in wanted]
    return table


def write(results: Results, folder: Path) -> str:
    """Writes RESULTS.md and its plots; returns the main tables."""
    settings = found_by_setting(results)
    if not settings:
        return "No results yet."
    folder.mkdir(parents=True, exist_ok=True)
    tables = (
        summary_table(settings),
        lr_summary_table(settings),
        same_lr_table(settings, "1 epoch"),
        carry_over_table(settings),
    )
    main = [markdown(table) for table in tables]
    (folder / "RESULTS.md").write_text("\n".join(_document(settings, main)))
    plot(settings, "lr.png", folder)
    plot(settings, "steps.png", folder)
    return "\n\n".join([*main, f"Wrote RESULTS.md, lr.png and steps.png to {folder}."])


def _document(
    settings: Mapping[Setting, Mapping[str, Found]], main: Sequence[str]
) -> Iterator[str]:
    summary, lr_summary, same_lr, carried = main
    yield (
        "# Results of the study\n\n"
        "Written by `python -m examples.study report`; `make study-full` makes all of them. Test "
        "figures, mean ± standard deviation over the seeds, at the lr, from a grid of half "
        "decades, that has the best AUC on validation samples. The best epoch is the one with the "
        "best validation AUC. Rare: the fifth of the samples whose ids are least frequent.\n\n"
        f"## AUC\n\n{summary}\n\n"
        "## How much the choice of lr matters\n\n"
        "Decades of lr whose validation AUC is within 0.002 of the best, and the test AUC that is "
        f"lost at 3 and 10 times the best lr.\n\n{lr_summary}\n\n![AUC by lr](lr.png)\n\n"
        f"Test AUC after one epoch at the same lr:\n\n{same_lr}\n\n"
        "## At the lr of row-wise Adagrad\n\n"
        "FrequencySGD at the lr that is best for row-wise Adagrad at the smallest batch size, and "
        f"how far that is behind row-wise Adagrad at its best.\n\n{carried}\n\n"
        "## AUC by steps\n\nOn validation samples, at the lr that is best after one epoch.\n\n"
        "![AUC by steps](steps.png)\n"
    )
    for (name, batch_size), arms in settings.items():
        columns = None if len(_when(name)) > 1 else 5
        figures = [row[:columns] for row in main_table(arms)]
        tables = (figures, lr_table(arms, "1 epoch"), steps_table(arms))
        parts = "\n\n".join(map(markdown, tables))
        yield f"## {name}, batch {batch_size}\n\n{parts}\n"


def plot(settings: Mapping[Setting, Mapping[str, Found]], file: str, folder: Path) -> None:
    """Plots AUC by lr (lr.png) or by steps (steps.png), a panel a setting."""
    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    size = (5.2 * columns, 3.6 * lines)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=size, layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(settings) :]:
        panel.axis("off")
    labels = dict.fromkeys(label for arms in settings.values() for label in arms)
    colours = {label: f"C{number}" for number, label in enumerate(labels)}
    lines_by_label: dict[str, Any] = {}
    for panel, ((name, batch_size), arms) in zip(panels.flat, settings.items(), strict=False):
        best = 0.0
        for label, found in arms.items():
            if file == "lr.png":
                x: list[Any] = [lr_at(exponent) for exponent in found.tried]
                y = [found.auc("1 epoch", exponent) for exponent in found.tried]
            else:
                curve = mean_curve(found.tried[found.best("1 epoch")])
                x, y = list(curve), list(curve.values())
            best = max(best, *y)
            # After ten colours they repeat, with another line.
            style = "-" if list(colours).index(label) < 10 else "--"
            (line,) = panel.plot(x, y, style, marker=".", color=colours[label])
            lines_by_label[label] = line
        if file == "lr.png":
            panel.set(xscale="log", xlabel="lr", ylabel="test AUC, 1 epoch")
            panel.set_ylim(best - 0.06, best + 0.005)
        else:
            panel.set(xlabel="steps", ylabel="validation AUC")
            panel.set_ylim(best - 0.04, best + 0.003)
        panel.set_title(f"{name}, batch {batch_size}", fontsize="medium")
        panel.grid(alpha=0.3)
    figure.legend(
        lines_by_label.values(), lines_by_label.keys(), loc="outside lower center", ncols=2
    )
    figure.savefig(folder / file, dpi=90)
    pyplot.close(figure)


def _mean_and_deviation(figures: Sequence[float]) -> str:
    deviation = statistics.stdev(figures) if len(figures) > 1 else 0.0
    return f"{statistics.fmean(figures):.4f} ± {deviation:.4f}"


def _when(name: str) -> list[str]:
    single = any(
        e.name == name and e.epochs == 1 for chosen in EXPERIMENTS.values() for e in chosen
    )
    return ["1 epoch"] if single else list(WHEN)
