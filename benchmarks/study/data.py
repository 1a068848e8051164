"""The data sets of the study behind one interface: MovieLens, Criteo files, planted embeddings."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES
from torchrec.datasets.utils import Batch

from benchmarks.common import movielens, planted
from benchmarks.common.days import Days, find_days, single_ids
from benchmarks.study.config import in_time

EVALUATION_BATCH = 4096  # samples
MAX_ROWS = 300_000  # of a Criteo table: larger ids are taken modulo this
SPLITS = ("train", "valid", "test")
RARE = 0.2  # share of the held-out samples that count as rare


@dataclass
class Dataset:
    """Click-through data.

    Attributes:
        tables: sparse feature -> rows of its table.
        dense: dense features.
        batch: from the numbers of samples, [samples] int64, to these samples.
        rows: name of a split -> [samples] int64 numbers of its samples.
        rare: [all samples] bool: those of rare ids.
        in_time: whether epochs keep the order of `rows["train"]`; else they are shuffled.
    """

    tables: dict[str, int]
    dense: int
    batch: Callable[[Tensor], Batch]
    rows: Mapping[str, Tensor]
    rare: Tensor
    in_time: bool

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch; what does not fill one is left out."""
        return len(self.rows["train"]) // batch_size

    def train_rows(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """The numbers of the samples of each batch of an epoch."""
        order = self.rows["train"]
        if not self.in_time:
            random = torch.Generator().manual_seed(seed)
            order = order[torch.randperm(len(order), generator=random)]
        yield from order.split(batch_size)[: self.steps(batch_size)]

    def train(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """One epoch."""
        return map(self.batch, self.train_rows(batch_size, seed))

    def held_out(self, *splits: str) -> list[tuple[Batch, Tensor]]:
        """Batches of the splits, each with a mask of its rare samples."""
        rows = torch.cat([self.rows[split] for split in splits])
        return [(self.batch(part), self.rare[part]) for part in rows.split(EVALUATION_BATCH)]

    def counts(self) -> dict[str, Tensor]:
        """Sparse feature -> [rows] occurrences in the train split."""
        ids = self.batch(self.rows["train"]).sparse_features.to_dict()
        return {f: torch.bincount(ids[f].values(), minlength=n) for f, n in self.tables.items()}


def movielens_data(folder: Path, *, in_time: bool, ids_only: bool) -> Dataset:
    """MovieLens-100K or -1M. Rare: ratings of the least rated items.

    Args:
        in_time: the oldest 80 % of the ratings are the stream, the rest is held out, half for each
            split; otherwise a random 80 / 10 / 10 split.
        ids_only: users and items are the only features.
    """
    data = movielens.read(folder)
    rows = dict(zip(SPLITS, (data.train, data.valid, data.test), strict=True))
    if in_time:
        order = data.dense[:, 2].argsort(stable=True)  # the time of the rating
        ends = [len(order) * 8 // 10, len(order) * 9 // 10]
        rows = dict(zip(SPLITS, order.tensor_split(ends), strict=True))
        # A stream has no time for a feature: it never comes again.
        data = replace(data, dense=data.dense[:, :2])
    if not ids_only:
        return Dataset(data.tables, data.dense.shape[1], data.batch, rows, data.rare, in_time)
    tables = {name: data.tables[name] for name in ("user", "item")}
    columns = [list(data.tables).index(name) for name in tables]
    # The dense part of a model must have an input.
    constant = torch.ones(len(data.labels), 1)
    ids = data.ids[:, columns]

    def batch(some: Tensor) -> Batch:
        return single_ids(list(tables), ids[some], constant[some], data.labels[some])

    return Dataset(tables, 1, batch, rows, data.rare, in_time)


def criteo_data(folder: Path, *, in_time: bool = False) -> Dataset:
    """Criteo files: the last day is held out, half for each split.

    Rare: samples whose ids have the lowest mean log count in the train days, over the tables.

    Args:
        folder: day_*_{dense,sparse,labels}.npy, as TorchRec's npy_preproc_criteo makes them.
    """
    days = find_days(folder)
    samples = Days(days).read(0, sum(day.samples for day in days))
    ids, held_out = samples["sparse"], days[-1].samples
    sizes = np.minimum(ids.max(axis=0).astype(np.int64) + 1, MAX_ROWS)
    ids %= sizes.astype(ids.dtype)
    last = len(ids) - held_out
    counts = [np.bincount(column[:last], minlength=column.max() + 1)[column] for column in ids.T]
    mean_log_count = np.log1p(counts).mean(axis=0)
    tables = dict(zip(DEFAULT_CAT_NAMES, sizes.tolist(), strict=True))
    dense_BD = torch.from_numpy(samples["dense"])
    labels_B = torch.from_numpy(samples["labels"].ravel())
    ids_BF = torch.from_numpy(ids)

    def batch(some: Tensor) -> Batch:
        return single_ids(list(tables), ids_BF[some].long(), dense_BD[some], labels_B[some])

    ends = [last, last + held_out // 2]
    rows = dict(zip(SPLITS, torch.arange(len(ids)).tensor_split(ends), strict=True))
    rare = torch.from_numpy(mean_log_count < np.quantile(mean_log_count[last:], RARE))
    return Dataset(tables, dense_BD.shape[1], batch, rows, rare, in_time)


def find(name: str, folder: Path) -> Path | None:
    """The files of a data set, made first where they can be; None if they are not in `folder`.

    Args:
        name: a planted task, "criteo", or "ml-100k" or "ml-1m", with "-time" for the order of time
            and with "-ids" for users and items alone.
    """
    path = folder / name.removesuffix("-ids").removesuffix("-time")
    if name in planted.TASKS:
        planted.generate(planted.TASKS[name], path)
    elif path.name == "ml-100k":
        movielens.fetch(path)
    return path if path.exists() else None


@functools.cache
def load(name: str, folder: Path) -> Dataset:
    """A data set that `find` finds."""
    if (path := find(name, folder)) is None:
        raise FileNotFoundError(f"{folder} does not hold {name}.")
    if path.name.startswith("ml-"):
        return movielens_data(path, in_time=in_time(name), ids_only=name.endswith("-ids"))
    return criteo_data(path, in_time=in_time(name))
