"""What 2D parallelism does to the rates: groups that train on parts of a batch, and are averaged.

    python -m benchmarks.groups

Of each batch every one of M groups takes a part, with a loss that is the mean over that part, and
after every step weights and optimizer states are averaged over the groups, as TorchRec's
`DMPCollection` does where it is synced in every step. The dense layers see the mean gradient. The
batch as a whole is the same for each M, so a rule whose steps do not depend on M has the same best
lr, and the same AUC there.

Source: Meta, "Two-dimensional sparse parallelism", arXiv 2508.03854, which divides row-wise
Adagrad's sums by M, that is multiplies lr by sqrt(M).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.ranks import start_ranks
from benchmarks.study.config import FREQUENCY, ROWWISE, Arm, Run
from benchmarks.study.data import Dataset, load
from benchmarks.study.sweep import best_of, lr_at, next_exponents
from benchmarks.study.train import build
from torchrec_freq.counts.state import TableState
from torchrec_freq.sharded.install import frequency_modules
from torchrec_freq.sharded.tables import part_of_sum

TASKS = (("FM", "ml-100k-time-ids", 256), ("FM", "ml-100k", 1024), ("DLRM", "clicks-4", 1024))
GROUPS = (1, 2, 4)
SEEDS = 2


def local_tables(model: Any) -> list[Tensor]:
    """The tables' memory."""
    values = model.state_dict().values()
    return [s.tensor for v in values if hasattr(v, "local_shards") for s in v.local_shards()]


def momenta(model: Any) -> list[Tensor]:
    """Row-wise Adagrad's sums, the memory itself."""
    states = model.fused_optimizer.state_dict()["state"].values()
    return [
        shard.tensor
        for state in states
        for name, value in state.items()
        if name.endswith(".momentum1")
        for shard in value.local_shards()
    ]


def average(tensors: Sequence[Tensor]) -> None:
    """Makes of tensors their mean."""
    mean = torch.stack([tensor.detach() for tensor in tensors]).mean(dim=0)
    for tensor in tensors:
        tensor.detach().copy_(mean)


@torch.no_grad()
def sync(models: Sequence[Any]) -> None:
    """What ``DMPCollection.sync`` does, in one process."""
    for part in (local_tables, momenta):
        for tensors in zip(*map(part, models), strict=True):
            average(tensors)
    handles = [handle for model in models for _, handle in frequency_modules(model)]
    for name in handles[0].tables if handles else ():
        states = [handle.read(name) for handle in handles]
        counts_R = torch.stack([state.counts for state in states]).sum(dim=0)
        totals = torch.stack([state.totals for state in states]).mean(dim=0)
        for group, handle in enumerate(handles):
            part_R = part_of_sum(counts_R, group, len(handles))
            handle.load(name, TableState(part_R, totals, states[0].age))


def auc(data: Dataset, run: Run, groups: int) -> dict[str, float]:
    """AUC after one epoch on the validation and on the test split."""
    trainings = [build(run, data) for _ in range(groups)]
    for rows in data.train_rows(run.batch_size, run.seed):
        for training, part in zip(trainings, rows.chunk(groups), strict=True):
            training.optimizer.zero_grad()
            loss, _ = training.model(data.batch(part))
            loss.backward()
        dense = [list(training.dense_optimizer.params.values()) for training in trainings]
        for parameters in zip(*dense, strict=True):
            average([parameter.grad for parameter in parameters])
        for training in trainings:
            training.optimizer.step()
        sync([training.model for training in trainings])
    evaluate = trainings[0].evaluate
    return {split: evaluate(data.held_out(split))["auc"] for split in ("valid", "test")}


class Search:
    """The runs of an arm with a number of groups, by lr; made when they are asked for."""

    def __init__(self, task: tuple[str, str, int], arm: Arm, groups: int, data: Dataset) -> None:
        self._task, self._arm, self._groups, self._data = task, arm, groups, data
        self._runs: dict[int, dict[str, float]] = {}

    def at(self, exponent: int) -> dict[str, float]:
        """Mean AUC over the seeds."""
        if exponent not in self._runs:
            model, name, batch = self._task
            runs = [
                Run(name, model, self._arm, lr_at(exponent), batch, 1, seed)
                for seed in range(SEEDS)
            ]
            found = [auc(self._data, run, self._groups) for run in runs]
            self._runs[exponent] = {
                split: statistics.fmean(figures[split] for figures in found) for split in found[0]
            }
        return self._runs[exponent]

    def best(self, start: int) -> int:
        """The best lr on the validation split, by the study's search."""
        while wanted := next_exponents({e: f["valid"] for e, f in self._runs.items()}, start):
            for exponent in wanted:
                self.at(exponent)
        return best_of({exponent: figures["valid"] for exponent, figures in self._runs.items()})


def report(folder: Path) -> None:
    """Prints the table, a line as soon as it is known."""
    print("| task | optimizer | groups | best lr | AUC | at lr of one group | at lr * sqrt(M) |")
    print("|---|---|---|---|---|---|---|")
    for task in TASKS:
        data = load(task[1], folder)
        for arm in (FREQUENCY, ROWWISE):
            first = None
            for groups in GROUPS:
                search = Search(task, arm, groups, data)
                best = search.best(arm.start if first is None else first)
                first = best if first is None else first
                root = first + round(2 * math.log10(groups))  # of quarter decades
                cells = [search.at(exponent)["test"] for exponent in (best, first, root)]
                figures = " | ".join(f"{value:.4f}" for value in cells)
                name = f"{task[0]}, {task[1]}, batch {task[2]}"
                print(
                    f"| {name} | {arm.optimizer} | {groups} | {lr_at(best):g} | {figures} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".data"), help="folder of the data sets")
    folder = parser.parse_args().data
    with start_ranks():
        report(folder)


if __name__ == "__main__":
    main()
