"""What a switch between row-wise Adagrad and FrequencySGD costs, and what a pre-pass gives.

    python -m benchmarks.switch -o docs        # some minutes; switch-in.png and switch-back.png

A DLRM is trained on made-up clicks, each seen once, and stops; from its checkpoint it goes on in
several ways, on the same batches. Then models begin anew, with and without counts of the data.
The loss is that of samples of the last day, which no model is trained on.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES

from benchmarks.common import planted
from benchmarks.common.checkpoint import Checkpoints
from benchmarks.common.days import Batches, Days, find_days
from benchmarks.common.ranks import start_ranks
from benchmarks.common.training import Training
from benchmarks.pictures import GREY, picture
from examples.criteo.model import build
from examples.criteo.settings import Data, Model, Optimizer, Planner, Settings
from examples.criteo.start import start
from torchrec_freq import save_counts
from torchrec_freq.counts.ids import count_ids

LR: Final = 0.05
BATCH: Final = 512
AFTER: Final = 100  # steps that are looked at after a switch
EVERY: Final = 5
ADAGRAD, FREQUENCY = "RowWiseAdagrad", "FrequencySGD"

Curve = Sequence[tuple[float, float]]
"""Losses by step."""


@dataclass(frozen=True)
class Bench:
    """Data, and the settings that all runs share.

    Attributes:
        before: steps before the switch.
        counts: file of the counts of the samples before it.
    """

    settings: Settings
    rows: list[int]
    train: Batches
    held_out: list[Any]
    before: int
    counts: Path

    def begin(self, optimizer: str, **options: Any) -> Training:
        """A model before its first step, or after what it starts from."""
        settings = replace(self.settings, optimizer=Optimizer(name=optimizer, lr=LR), **options)  # type: ignore[arg-type]
        training = build(settings, self.rows, torch.device("cpu"))
        start(settings, training)
        return training

    def run(self, training: Training, steps: range, every: int) -> list[tuple[float, float]]:
        """Trains, and evaluates before the first step and after each ``every`` steps."""
        curve = [(float(steps.start), self.loss(training))]
        for step in steps:
            training.step(self.train[step])
            if (step + 1 - steps.start) % every == 0:
                curve.append((float(step + 1), self.loss(training)))
        return curve

    @torch.no_grad()
    def loss(self, training: Training) -> float:
        """Mean log loss of the held-out samples."""
        training.model.eval()
        losses = []
        for batch in self.held_out:
            _, (_, logits, labels) = training.model(batch)
            losses.append(float(binary_cross_entropy_with_logits(logits, labels.float())))
        training.model.train()
        return statistics.fmean(losses)


def switch(bench: Bench, old: str, ways: dict[str, dict[str, Any]]) -> dict[str, Curve]:
    """Loss around the step at which a run of one optimizer is gone on with in several ways."""
    training = bench.begin(old)
    shown = range(bench.before - AFTER // 2, bench.before)
    bench.run(training, range(shown.start), bench.before)
    before = bench.run(training, shown, EVERY)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), settings={"batch_size": BATCH})
        checkpoints.save(bench.before, training.state())
        found = checkpoints.latest()
        assert found is not None
        after = range(bench.before, bench.before + AFTER)
        curves: dict[str, Curve] = {}
        for name, options in ways.items():
            curve = bench.run(bench.begin(init_from=found.path, **options), after, EVERY)
            curves[name] = [*(before[:-1] if not curves else ()), *curve]
    return curves


def table(at: list[int], rows: Mapping[str, Iterable[str]]) -> str:
    """Losses by step, as Markdown."""
    lines = ["| | " + " | ".join(f"step {step}" for step in at) + " |"]
    lines.append("|---|" + "--:|" * len(at))
    return "\n".join([*lines, *(f"| {name} | {' | '.join(rows[name])} |" for name in rows)])


def fresh(bench: Bench, seeds: int, at: list[int]) -> dict[str, list[str]]:
    """Models from their first step on, with counts of a pre-pass and without."""
    rows: dict[str, list[str]] = {}
    for name, counts in (
        ("counts of a pre-pass", str(bench.counts)),
        ("counts from zero", "zero"),
    ):
        runs = []
        for seed in range(seeds):
            training = bench.begin(FREQUENCY, init_counts=counts, seed=seed)
            runs.append(dict(bench.run(training, range(at[-1]), at[0])))
        for losses in ([run[step] for run in runs] for step in at):
            deviation = statistics.stdev(losses) if seeds > 1 else 0.0
            rows.setdefault(name, []).append(f"{statistics.fmean(losses):.4f} ± {deviation:.4f}")
    return rows


def draw(path: Path, title: str, curves: Mapping[str, Curve], mark: float) -> None:
    """The first curve is what the others are compared with, and is seen below them."""
    with picture(path) as figure:
        figure.set_size_inches(7.5, 3.8)
        panel = figure.subplots()
        for number, (name, curve) in enumerate(curves.items()):
            pen = {} if number else {"linewidth": 7, "alpha": 0.4}
            panel.plot(*zip(*curve, strict=True), label=name, **pen)
        panel.axvline(mark, color=GREY, linestyle="--", linewidth=1)
        panel.set(title=title, xlabel="step", ylabel="log loss of held-out samples")
        figure.legend(loc="outside lower center", ncols=2)


def prepare(folder: Path, before: int, held_out: int) -> Bench:
    """Made-up clicks, enough for every sample to be seen once, and their counts."""
    samples = (before + AFTER) * BATCH // 4 + BATCH
    planted.generate(planted.Task(days=5, samples=samples, held_out=held_out), folder)
    days = find_days(folder)
    sparse = [np.load(day.files["sparse"].path) for day in days]
    rows = [int(most) + 1 for most in np.max([ids.max(axis=0) for ids in sparse], axis=0)]
    settings = Settings(
        batch_size=BATCH,
        data=Data(folder=folder, rows=rows),
        model=Model(dim=16, bottom=[32], top=[64, 32]),
        planner=Planner(sharding=["table_wise"]),
    )
    train, last = Days(days[:-1]), Days(days[-1:])
    options: dict[str, Any] = {"rows": rows, "modulo": False}
    batches = Batches(train, range(len(train)), batch_size=BATCH, whole=True, **options)
    evaluation = Batches(last, range(len(last)), batch_size=8192, **options)
    ids = np.concatenate(sparse[:-1])[: before * BATCH]
    counts = folder / "counts.safetensors"
    by_table = {name: ids[:, index] for index, name in enumerate(DEFAULT_CAT_NAMES)}
    save_counts(counts, count_ids([by_table], dict(zip(DEFAULT_CAT_NAMES, rows, strict=True))))
    held = [evaluation[step] for step in range(evaluation.steps)]
    return Bench(settings, rows, batches, held, before, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="for the pictures")
    parser.add_argument("--steps", type=int, default=1000, help="before a switch")
    parser.add_argument("--held-out", type=int, default=30_000, help="samples")
    parser.add_argument("--seeds", type=int, default=3, help="of the models that begin anew")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    steps: int = arguments.steps
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, start_ranks():
        bench = prepare(Path(temporary, "data"), steps, arguments.held_out)
        into = switch(
            bench,
            ADAGRAD,
            {
                "row-wise Adagrad goes on": {"optimizer": ADAGRAD},
                "FrequencySGD, counts from the sums": {"optimizer": FREQUENCY},
                "FrequencySGD, counts of the data": {
                    "optimizer": FREQUENCY,
                    "init_counts": str(bench.counts),
                },
                "FrequencySGD, counts from zero": {"optimizer": FREQUENCY, "init_counts": "zero"},
            },
        )
        back = switch(
            bench,
            FREQUENCY,
            {
                "FrequencySGD goes on": {"optimizer": FREQUENCY},
                "row-wise Adagrad, sums from the counts": {"optimizer": ADAGRAD},
                "row-wise Adagrad, sums from zero": {"optimizer": ADAGRAD, "init_counts": "zero"},
            },
        )
        early = [steps // 10, steps // 2, steps]
        begun = table(early, fresh(bench, arguments.seeds, early))
    shown = [steps + share * AFTER // 10 for share in (0, 1, 5, 10)]
    for name, title, curves in (
        ("switch-in", "From row-wise Adagrad to FrequencySGD", into),
        ("switch-back", "From FrequencySGD back to row-wise Adagrad", back),
    ):
        path = arguments.output / f"{name}.png"
        draw(path, title, curves, steps)
        losses = {way: dict(curve) for way, curve in curves.items()}
        rows = {way: [f"{found[step]:.4f}" for step in shown] for way, found in losses.items()}
        print(f"\n{title} ({path})\n\n{table(shown, rows)}")
    print(f"\nFrequencySGD from its first step on, {arguments.seeds} seeds\n\n{begun}")


if __name__ == "__main__":
    main()
