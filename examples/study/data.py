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

EVALUATION_BATCH = 4096  # samples, all ranks
MAX_ROWS = 100_000  # of a Criteo table: larger ids are taken modulo this
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
    """MovieLens-100K or -1M. Rare: ratings of the least rated items."""

    def __init__(self, folder: Path) -> None:
        self._data = movielens.read(folder)
        self.tables = self._data.tables
        self.dense = self._data.dense.shape[1]
        values = self._data.batch(self._data.train).sparse_features.to_dict()
        self.counts = {
            name: torch.bincount(values[name].values(), minlength=rows)
            for name, rows in self.tables.items()
        }

    def steps(self, batch_size: int) -> int:
        return len(self._data.train) // batch_size

    def train(self, batch_size: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        order = self._data.train[torch.randperm(len(self._data.train), generator=generator)]
        for rows in order.split(batch_size)[: self.steps(batch_size)]:
            yield self._data.batch(_share(rows))

    def held_out(self, split: str) -> list[tuple[Batch, Tensor]]:
        rows = {"valid": self._data.valid, "test": self._data.test}[split]
        shares = [_share(part) for part in rows.split(EVALUATION_BATCH)]
        return [(self._data.batch(share), self._data.rare[share]) for share in shares]


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
    """A data set of the study; None if it has to be put into `folder` by hand and is not there."""
    path = folder / name
    if name == "ml-100k":
        movielens.fetch(path)
        return MovieLens(path)
    if name in planted.TASKS:
        task = planted.TASKS[name]
        planted.generate(task, path)
        return Criteo(path, shuffle=not task.drifts)
    if not path.exists():
        return None
    return MovieLens(path) if name == "ml-1m" else Criteo(path)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _share(rows: Tensor) -> Tensor:
    return rows.tensor_split(_ranks())[_rank()]
