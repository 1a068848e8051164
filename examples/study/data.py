"""The data sets of the study behind one interface: MovieLens, Criteo files, planted embeddings."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.criteo import (
    CAT_FEATURE_COUNT,
    DEFAULT_CAT_NAMES,
    INT_FEATURE_COUNT,
    BinaryCriteoUtils,
    InMemoryBinaryCriteoIterDataPipe,
)
from torchrec.datasets.utils import Batch

from examples import movielens
from examples.study import planted
from examples.study.config import in_time

EVALUATION_BATCH = 4096  # samples, all ranks
MAX_ROWS = 300_000  # of a Criteo table: larger ids are taken modulo this
RARE = 0.2  # share of the held-out samples that count as rare


class Dataset(Protocol):
    """Click-through data. Batches are this rank's share of a global batch."""

    tables: dict[str, int]
    """Sparse feature -> rows of its table."""
    dense: int
    """Dense features."""
    counts: dict[str, Tensor]
    """Sparse feature -> [rows] occurrences in one epoch."""

    def steps(self, batch_size: int) -> int:
        """Global batches in an epoch; what does not fill one is left out."""

    def train(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """One epoch."""

    def held_out(self, split: str) -> list[tuple[Batch, Tensor]]:
        """The split "valid" or "test": batches, each with a mask of its rare samples."""


class MovieLens:
    """MovieLens-100K or -1M. Rare: ratings of the least rated items.

    Args:
        folder: of the data set.
        in_time: the oldest 80 % of the ratings are the stream, the rest is held out, half for each
            split; otherwise a random 80 / 10 / 10 split, shuffled each epoch.
        ids_only: users and items are the only features.
    """

    def __init__(self, folder: Path, *, in_time: bool = False, ids_only: bool = False) -> None:
        self._data = movielens.read(folder)
        self._shuffle = not in_time
        self._features = ["user", "item"] if ids_only else list(self._data.tables)
        self._keys = [list(self._data.tables).index(name) for name in self._features]
        self.tables = {name: self._data.tables[name] for name in self._features}
        self.dense = 1 if ids_only else self._data.dense.shape[1]
        self._rows = {split: getattr(self._data, split) for split in ("train", "valid", "test")}
        if in_time:
            # The third dense feature is the time of the rating.
            order = self._data.dense[:, 2].argsort(stable=True)
            ends = [len(order) * 8 // 10, len(order) * 9 // 10]
            self._rows = dict(zip(self._rows, order.tensor_split(ends), strict=True))
        values = self._batch(self._rows["train"]).sparse_features.to_dict()
        self.counts = {
            name: torch.bincount(values[name].values(), minlength=rows)
            for name, rows in self.tables.items()
        }

    def steps(self, batch_size: int) -> int:
        return len(self._rows["train"]) // batch_size

    def train(self, batch_size: int, seed: int) -> Iterator[Batch]:
        order = self._rows["train"]
        if self._shuffle:
            generator = torch.Generator().manual_seed(seed)
            order = order[torch.randperm(len(order), generator=generator)]
        for rows in order.split(batch_size)[: self.steps(batch_size)]:
            yield self._batch(_share(rows))

    def held_out(self, split: str) -> list[tuple[Batch, Tensor]]:
        shares = [_share(part) for part in self._rows[split].split(EVALUATION_BATCH)]
        return [(self._batch(share), self._data.rare[share]) for share in shares]

    def _batch(self, rows: Tensor) -> Batch:
        batch = self._data.batch(rows)
        if len(self._keys) < len(self._data.tables):
            batch.sparse_features = batch.sparse_features.permute(self._keys)
            # A model's dense part must have an input.
            batch.dense_features = torch.ones(len(rows), 1)
        return batch


class Criteo:
    """Criteo files by TorchRec's readers: the last day is held out, half for each split.

    Rare: samples whose ids have the lowest mean log count in the train days, over the tables.

    Args:
        folder: day_*_{dense,sparse,labels}.npy, or the original files (*.tsv or *.txt, one a day),
            which are converted first.
        shuffle: False keeps the order of the files.
    """

    def __init__(self, folder: Path, *, shuffle: bool = True) -> None:
        convert_tsv(folder)
        days = sorted(folder.glob("*_sparse.npy"))
        if len(days) < 2:
            raise FileNotFoundError(
                f"{folder} holds {len(days)} days of Criteo data. Expected at least two, as "
                "day_0_sparse.npy with _dense and _labels, or as TSV files."
            )
        self._days = [str(day).removesuffix("_sparse.npy") for day in days]
        self._shuffle = shuffle
        sparse = [np.load(day, mmap_mode="r") for day in days]
        largest = np.max([day.max(axis=0) for day in sparse], axis=0)
        rows = np.minimum(largest + 1, MAX_ROWS)
        self.tables = dict(zip(DEFAULT_CAT_NAMES, rows.tolist(), strict=True))
        self.dense = INT_FEATURE_COUNT
        self._samples = sum(len(day) for day in sparse[:-1])
        train = np.concatenate([day % rows for day in sparse[:-1]])
        self.counts = {
            name: torch.from_numpy(np.bincount(train[:, column], minlength=self.tables[name]))
            for column, name in enumerate(self.tables)
        }
        self._rare_below = float(np.quantile(self._mean_log_count(sparse[-1] % rows), RARE))

    def steps(self, batch_size: int) -> int:
        return self._samples // batch_size

    def train(self, batch_size: int, seed: int) -> Iterator[Batch]:
        pipe = self._pipe("train", self._days[:-1], batch_size // _ranks(), seed)
        yield from pipe

    def held_out(self, split: str) -> list[tuple[Batch, Tensor]]:
        stage = {"valid": "val", "test": "test"}[split]
        batches = []
        for batch in self._pipe(stage, self._days[-1:], EVALUATION_BATCH // _ranks()):
            ids = batch.sparse_features.values().view(CAT_FEATURE_COUNT, -1).T.numpy()
            batches.append((batch, torch.from_numpy(self._mean_log_count(ids) < self._rare_below)))
        return batches

    def _pipe(
        self, stage: str, days: list[str], batch_size: int, seed: int = 0
    ) -> InMemoryBinaryCriteoIterDataPipe:
        dense, sparse, labels = (
            [f"{day}_{kind}.npy" for day in days] for kind in ("dense", "sparse", "labels")
        )
        return InMemoryBinaryCriteoIterDataPipe(
            stage,
            dense,
            sparse,
            labels,
            batch_size=batch_size,
            rank=_rank(),
            world_size=_ranks(),
            drop_last=stage == "train",
            shuffle_training_set=self._shuffle,
            shuffle_training_set_random_seed=seed,
            hashes=list(self.tables.values()),
        )

    def _mean_log_count(self, ids: np.ndarray) -> np.ndarray:
        counts = [
            count.numpy()[ids[:, column]] for column, count in enumerate(self.counts.values())
        ]
        mean: np.ndarray = np.log1p(counts).mean(axis=0)
        return mean


def convert_tsv(folder: Path) -> None:
    """Converts Criteo's own files in `folder` to the npy files that TorchRec's reader takes."""
    for file in sorted([*folder.glob("*.tsv"), *folder.glob("*.txt")]):
        sparse = folder / f"{file.stem}_sparse.npy"
        if not sparse.exists():
            dense, labels = folder / f"{file.stem}_dense.npy", folder / f"{file.stem}_labels.npy"
            temporary = sparse.with_suffix(".part")
            BinaryCriteoUtils.tsv_to_npys(str(file), str(dense), str(temporary), str(labels))
            temporary.rename(sparse)  # last: a folder that was cut off is converted again


@functools.cache
def load(name: str, folder: Path) -> Dataset | None:
    """A data set of the study; None if it has to be put into `folder` by hand and is not there.

    Args:
        name: a planted task, "criteo", or "ml-100k" or "ml-1m", with "-time" for the order of time
            and with "-ids" for users and items alone.
    """
    path = folder / name.removesuffix("-ids").removesuffix("-time")
    if name in planted.TASKS:
        planted.generate(planted.TASKS[name], path)
    elif path.name == "ml-100k":
        movielens.fetch(path)
    elif not path.exists():
        return None
    if path.name.startswith("ml-"):
        return MovieLens(path, in_time=in_time(name), ids_only=name.endswith("-ids"))
    return Criteo(path, shuffle=not in_time(name))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _share(rows: Tensor) -> Tensor:
    return rows.tensor_split(_ranks())[_rank()]
