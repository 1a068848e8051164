"""RESULTS.md: its tables and words. All figures are of samples that chose no lr."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.study import figures, verdict
from examples.study.compare import Arms, Difference, at_their_lr, at_times, found, gain, paired
from examples.study.config import (
    CHOOSING,
    FREQUENCY,
    HALF_LIVES,
    OWN_WEIGHT,
    OWN_WEIGHTS,
    ROWWISE,
    STREAM,
)
from examples.study.results import Results
from examples.study.sweep import STRESS, lr_at
from examples.study.verdict import Settings

Table = list[list[str]]
PROTOCOL = """\
Written by `python -m examples.study report`; `make study-full` makes all of it. The differences are
AUC of FrequencySGD less AUC of row-wise Adagrad, paired by seed (same initial weights, same order
of the data), ± the standard error of their mean. The seeds vary the weights and the order, not the
data: the error does not say how much another data set would differ. Each optimizer is at its own
best lr of a grid of quarter decades, chosen with the first seed: by AUC on validation samples after
that epoch, or, in a stream, by predict-then-train AUC over its first fifth. The judged samples are
others: the test split, the last four fifths of the stream, and what comes after the stream. Adam
with lr 0.001 trains the dense layers in every run.

`ml-100k`: MovieLens-100K, label: a rating of at least 4, random 80 / 10 / 10 split. `-time`: the
oldest 80 % are the stream, in its order; `-ids`: users and items are the only features. `clicks-N`:
planted embeddings in 26 tables of Criteo's format, N % clicks. `-drift`: the same, day after day,
with popularity (and for `full-drift` planted values) that move."""
ALT = {
    "differences": "AUC of FrequencySGD less that of row-wise Adagrad with error bars, a row a task",
    "lr": "AUC by lr of FrequencySGD, row-wise Adagrad and its clipped form, a panel a task",
    "epochs": "AUC after each epoch, a panel a shuffled task",
    "stream": "Predict-then-train AUC along each stream, less that of row-wise Adagrad",
    "rates": "Left: rate of a row by its count for both optimizers. Right: how far a row moves by "
    "how large its gradient is beside its past ones; FrequencySGD stays below lr sqrt(2 / "
    "own_weight), row-wise Adagrad below lr.",
}


def differences_table(settings: Settings) -> Table:
    """FrequencySGD less row-wise Adagrad, a row a task."""
    table = [["task", "row-wise Adagrad", "FrequencySGD less row-wise Adagrad"]]
    for name, arms in settings.items():
        if FREQUENCY.label in arms:
            measures = arms[ROWWISE.label].best
            theirs = [statistics.fmean(arms[ROWWISE.label].figures(m)) for m in measures]
            cells = [f"{measure}: {gain(arms, measure)}" for measure in measures]
            table.append([name, " / ".join(f"{auc:.4f}" for auc in theirs), ", ".join(cells)])
    return table


def targets_table(settings: Settings) -> Table:
    table = [["target", "met", "worst case", "where"]]
    for target in verdict.TARGETS:
        if cases := target.cases(settings):
            name, measure, worst = min(cases, key=lambda case: case[2].mean)
            met = sum(case[2].mean >= target.least for case in cases)
            verb = (
                "met" if met == len(cases) else f"**missed** in {len(cases) - met} of {len(cases)}"
            )
            table.append([target.text, verb, str(worst), f"{name}, {measure}"])
    return table


def own_weight_table(settings: Settings) -> Table:
    table = [["task", *(f"own_weight {weight}" for weight in OWN_WEIGHTS[1:])]]
    for experiment in CHOOSING:
        row = [f"{experiment.setting}, {experiment.measures[0]}"]
        for weight in OWN_WEIGHTS[1:]:
            cases = {name: d for name, _, d in verdict.own_weight_cases(settings, weight)}
            row.append(
                _cell(cases.get(experiment.setting), bold_below=-verdict.OWN_WEIGHT_MAY_COST)
            )
        table.append(row)
    return table


def half_life_table(settings: Settings) -> Table:
    table = [["task", *(f"half_life {steps}" for steps in HALF_LIVES)]]
    for names, floor in ((verdict.DRIFTS, 0.0), (verdict.STEADY, -verdict.HALF_LIFE_MAY_COST)):
        columns = [
            {case[:2]: case[2] for case in verdict.half_life_cases(settings, names, steps)}
            for steps in HALF_LIVES
        ]
        for key in dict.fromkeys(key for column in columns for key in column):
            cells = [_cell(column.get(key), bold_below=floor) for column in columns]
            table.append([", ".join(key), *cells])
    return table


def lr_table(settings: Settings) -> Table:
    """How FrequencySGD stands beside row-wise Adagrad where lr is not its best."""
    head = ["best lr, row-wise Adagrad", "FrequencySGD", "both at row-wise Adagrad's"]
    table = [["task", *head, "each at 3 times its best", "each at 10 times"]]
    for name, arms in settings.items():
        if FREQUENCY.label in arms:
            first = arms[ROWWISE.label].experiment.measures[0]
            best = [f"{lr_at(arms[arm.label].best[first]):g}" for arm in (ROWWISE, FREQUENCY)]
            beyond = [at_times(arms, first, steps) for steps in STRESS]
            cells = map(_cell, (at_their_lr(arms, first), *beyond))
            table.append([f"{name}, {first}", *best, *cells])
    return table


def arms_table(arms: Arms) -> Table:
    """Every arm of a setting: at its best lr, and how much AUC it loses beyond that."""
    table = [["optimizer"]]
    experiment = arms[ROWWISE.label].experiment
    for measure in experiment.measures:
        table[0] += [f"lr, {measure}", "AUC", "less row-wise Adagrad", "log loss"]
        table[0] += ["AUC, rare"] * (measure != STREAM)
    table[0] += ["lost at 3 times lr", "at 10 times"]
    for label, known in arms.items():
        row = [label]
        for measure, best in known.best.items():
            auc = known.figures(measure)
            difference = "" if label == ROWWISE.label else str(gain(arms, measure, label))
            row += [f"{lr_at(best):g}", f"{statistics.fmean(auc):.4f}", difference]
            for metric in ("log_loss", *["rare_auc"] * (measure != STREAM)):
                row.append(f"{statistics.fmean(known.figures(measure, metric=metric)):.4f}")
        first = experiment.measures[0]
        for steps in STRESS:
            beyond = known.figures(first, steps)
            row.append(f"{paired(known.figures(first), beyond).mean:.4f}" if beyond else "")
        table.append(row)
    return table


def markdown(table: Table) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(results: Results, folder: Path) -> str:
    """Writes RESULTS.md and its pictures; returns the main tables."""
    settings = found(results)
    if not settings:
        return "No results yet."
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(settings, folder)
    (folder / "RESULTS.md").write_text("\n\n".join(_document(settings, drawn)) + "\n")
    main = (differences_table(settings), targets_table(settings))
    files = ", ".join(f"{name}.svg" for name in drawn)
    return "\n\n".join([*map(markdown, main), f"Wrote RESULTS.md, {files} to {folder}."])


def _document(settings: Settings, drawn: Sequence[str]) -> Iterator[str]:
    pictures = {name: f"![{text}]({name}.svg)" for name, text in ALT.items() if name in drawn}
    yield "# Results of the study"
    yield PROTOCOL
    yield "## Beside row-wise Adagrad"
    yield pictures.get("differences", "")
    yield markdown(differences_table(settings))
    yield "## Targets\n\nAs they were set before the runs; the error bars take no part."
    yield markdown(targets_table(settings))
    yield "## What settles the defaults"
    yield "\n\n".join((verdict.__doc__ or "").split("\n\n")[1:]).strip()
    yield _settled(settings)
    yield "What a candidate gains over own_weight 1; bold: costs more than the rule allows."
    yield markdown(own_weight_table(settings))
    yield "What a half-life gains over none; bold: a loss that the rule does not allow."
    yield markdown(half_life_table(settings))
    yield "## How much the choice of lr matters"
    yield markdown(lr_table(settings))
    yield pictures.get("lr", "")
    yield "## Along the way"
    yield pictures.get("epochs", "")
    yield pictures.get("stream", "")
    yield "## The rate of a row"
    yield pictures.get("rates", "")
    for name, arms in settings.items():
        yield f"## {name}\n\n{markdown(arms_table(arms))}"


def _settled(settings: Settings) -> str:
    weight = verdict.settle_own_weight(settings)
    complete, half_life = verdict.settle_half_life(settings)
    return (
        f"own_weight: the rule chooses **{weight or 'nothing yet'}** (the default is "
        f"{OWN_WEIGHT:g}). half_life: **{half_life if complete else 'nothing yet'}**."
    )


def _cell(difference: Difference | None, bold_below: float = -1) -> str:
    if difference is None:
        return ""
    return f"**{difference}**" if difference.mean < bold_below else str(difference)
