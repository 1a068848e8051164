"""RESULTS.md: its tables and words. All figures are of samples that chose no lr."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.study import figures, verdict
from benchmarks.study.compare import Arms, Difference, Settings, found, gain, paired
from benchmarks.study.config import FREQUENCY, FULL, OWN_WEIGHT, ROWWISE, STREAM
from benchmarks.study.sweep import STRESS, Results, lr_at
from benchmarks.study.verdict import Cases

Table = list[list[str]]
PROTOCOL = """\
# Results of the study

Written by `python -m benchmarks.study report`; `make study-full` makes all of it. The differences
are AUC of FrequencySGD less AUC of row-wise Adagrad, paired by seed (the same initial weights and
order of the data), ± the standard error of the mean. The seeds vary weights and order, not the
data: the error does not say how much another data set would differ. Each optimizer is at its own
best lr of a grid of quarter decades, chosen by the seeds' mean AUC on validation samples after that
epoch, or, in a stream, in predict-then-train over its first fifth. Others are judged: the test
split, the last four fifths of the stream, and the samples after it. Adam trains the dense layers.

`ml-100k`: MovieLens-100K, label: a rating of at least 4, random 80 / 10 / 10 split. `-time`: the
oldest 80 % are the stream, in its order; `-ids`: users and items are the only features. `clicks-N`:
planted embeddings in 26 tables of Criteo's format, N % clicks. `-drift`: the same, day after day,
with popularity, and for `full-drift` planted values, that move. `ClippedRowWiseAdagrad` is row-wise
Adagrad with the weight of the own square of FrequencySGD: what clipping adds without counts, see
`ablation.py`. FBGEMM 1.9's `ROWWISE_RMSPROP_AR` is left out: TorchRec has no class that leads to
it."""


def differences_table(settings: Settings) -> Table:
    """FrequencySGD beside row-wise Adagrad, a row a task and measure."""
    table = [["task", "row-wise Adagrad", "FrequencySGD", "difference"]]
    for name, arms in settings.items():
        for measure in arms[ROWWISE.label].best:
            if (difference := gain(arms, measure)) is not None:
                both = [f"{arms[arm.label].mean(measure):.4f}" for arm in (ROWWISE, FREQUENCY)]
                table.append([f"{name}, {measure}", *both, str(difference)])
    return table


def targets_table(settings: Settings) -> Table:
    table = [["target", "met", "worst case", "where"]]
    for target in verdict.TARGETS:
        if cases := verdict.cases(settings, target.chosen, target.difference):
            worst = min(cases, key=lambda name: cases[name].mean)
            missed = sum(case.mean < target.least for case in cases.values())
            met = f"**missed** in {missed} of {len(cases)}" if missed else "met"
            table.append([target.text, met, str(cases[worst]), worst])
    return table


def cases_table(columns: Mapping[str, Cases], floor: float = -1) -> Table:
    """A row a task and measure; bold: below the floor."""
    rows = dict.fromkeys(case for cases in columns.values() for case in cases)
    table = [["task", *columns]]
    for row in rows:
        table.append([row, *(_cell(cases.get(row), floor) for cases in columns.values())])
    return table


def arms_table(arms: Arms) -> Table:
    """Every arm of a setting at its best lr, and the AUC that it loses at 3 and 10 times that."""
    measures = arms[ROWWISE.label].experiment.measures
    table = [["optimizer"]]
    for measure in measures:
        table[0] += [f"lr, {measure}", "AUC", "less row-wise Adagrad", "log loss"]
        table[0] += ["AUC, rare"] * (measure != STREAM)
    table[0] += ["lost at 3 times lr", "at 10 times"]
    for label, known in arms.items():
        row = [label]
        for measure, best in known.best.items():
            row += [f"{lr_at(best):g}", f"{known.mean(measure):.4f}"]
            row.append("" if label == ROWWISE.label else _cell(gain(arms, measure, label)))
            for metric in ("log_loss", *["rare_auc"] * (measure != STREAM)):
                row.append(f"{known.mean(measure, metric):.4f}")
        for steps in STRESS:
            best = known.best[measures[0]]
            at_best, beyond = (known.at(lr, measures[0]) for lr in (best, best + steps))
            row.append(f"{paired(at_best, beyond).mean:.4f}" if beyond else "")
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
    main = map(markdown, (differences_table(settings), targets_table(settings)))
    files = ", ".join(f"{name}.png" for name in drawn)
    return "\n\n".join([*main, f"Wrote RESULTS.md, {files} to {folder}."])


def _document(settings: Settings, drawn: Mapping[str, str]) -> Iterator[str]:
    pictures = {name: f"![{text}]({name}.png)" for name, text in drawn.items()}
    yield PROTOCOL
    yield "## Beside row-wise Adagrad"
    yield pictures.get("differences", "")
    yield markdown(differences_table(settings))
    yield "## Targets\n\nAs they were set before any run, for the mean over the seeds."
    yield markdown(targets_table(settings))
    yield "## What settles the defaults"
    yield (verdict.__doc__ or "").split("\n\n", 1)[1].strip()
    yield (
        f"The rules choose **own_weight {verdict.settle_own_weight(settings) or 'nothing yet'}** "
        f"(the default is {OWN_WEIGHT:g}) and **half_life: {verdict.settle_half_life(settings)}**. "
        "What the candidates gain over own_weight 1, and half-lives over none; bold: a cost that "
        "the rule does not allow, or no gain on a drift."
    )
    costs = verdict.own_weight_cases(settings)
    candidates = {f"own_weight {n}": costs[n] for n in costs if n > 1}
    yield markdown(cases_table(candidates, -verdict.OWN_WEIGHT_MAY_COST))
    for chosen, floor in ((verdict.DRIFTING, 0), (verdict.STEADY, -verdict.HALF_LIFE_MAY_COST)):
        gains = verdict.half_life_cases(settings, chosen[0])
        yield markdown(cases_table({f"half_life {n}": gains[n] for n in gains}, floor))
    yield "## How much the choice of lr matters\n\nFrequencySGD less row-wise Adagrad:"
    first = partial(verdict.cases, settings, f"epoch 1|{STREAM}")
    beyond = {
        "both at row-wise Adagrad's best lr": first(partial(gain, at_their_lr=True)),
        "each at 3 times its best": first(partial(gain, times=STRESS[0])),
        "each at 10 times": first(partial(gain, times=STRESS[1])),
    }
    yield markdown(cases_table(beyond))
    yield pictures.get("lr", "")
    yield "## Along the way"
    yield pictures.get("epochs", "")
    yield pictures.get("stream", "")
    yield "## The rate of a row"
    yield pictures.get("rates", "")
    for name, arms in settings.items():
        yield f"## {name}\n\n{markdown(arms_table(arms))}"
    absent: dict[str, dict[str, None]] = {}
    for experiment in FULL:
        for arm in experiment.arms:
            if arm.label not in settings.get(experiment.setting, {}):
                absent.setdefault(experiment.setting, {})[arm.label] = None
    yield "## Not run\n\nThe full form also has these; ml-1m and criteo need files:"
    yield "\n".join(f"- {name}: {'; '.join(arms)}" for name, arms in absent.items()) or "none"


def _cell(difference: Difference | None, floor: float = -1) -> str:
    if difference is None:
        return ""
    return f"**{difference}**" if difference.mean < floor else str(difference)
