"""Criteo npy files as one sequence of samples, and the batches of a rank.

A day is three files as TorchRec makes them: day_0_dense.npy float32 [n, 13], day_0_sparse.npy int32
or int64 [n, 26], and day_0_labels.npy int32 [n, 1].
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES, INT_FEATURE_COUNT
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq.counts.data_files import map_npy

KINDS: Final = ("dense", "sparse", "labels")
DTYPES: Final = {"dense": ["float32"], "sparse": ["int32", "int64"], "labels": ["int32"]}
COLUMNS: Final = {"dense": INT_FEATURE_COUNT, "sparse": CAT_FEATURE_COUNT, "labels": 1}

Samples = dict[str, NDArray[Any]]
"""Kind -> values [n, columns]."""


@dataclass(frozen=True)
class File:
    """An npy file of values [samples, columns], as its header has it.

    The header is read once, by whoever finds the file: NumPy has Python parse it, and in Python
    3.10 and 3.11 threads that parse at once now and then raise a SystemError (gh-106905).
    """

    path: Path
    dtype: np.dtype[Any]
    samples: int
    columns: int
    offset: int  # bytes before the values

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Samples start to stop, from the disk."""
        skipped = self.offset + start * self.columns * self.dtype.itemsize
        count = (stop - start) * self.columns
        values = np.fromfile(self.path, self.dtype, count, offset=skipped)
        if len(values) < count:
            raise ValueError(f"{self.path} has been cut since it was found; start again.")
        return values.reshape(-1, self.columns)


@dataclass(frozen=True)
class Day:
    """The three files of a day, of equally many samples."""

    files: dict[str, File]  # by kind

    @property
    def samples(self) -> int:
        return self.files["dense"].samples

    def read(self, start: int, stop: int) -> Samples:
        """Samples start to stop, from the disk."""
        return {kind: file.read(start, stop) for kind, file in self.files.items()}


def find_days(folder: Path) -> list[Day]:
    """The days in a folder, in order of their numbers.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is not what it should be; the message names it.
    """
    stems = {
        path.name.removesuffix(f"_{kind}.npy")
        for kind in KINDS
        for path in folder.glob(f"day_*_{kind}.npy")
    }
    numbers = {stem: stem.removeprefix("day_") for stem in stems}
    if odd := sorted(stem for stem, number in numbers.items() if not number.isdecimal()):
        raise ValueError(f"{folder / odd[0]}_*.npy: days are named day_0, day_1 and so on.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Every rank must see the same data.")
    if len(stems) < 2:
        raise FileNotFoundError(
            f"{folder} holds {len(stems)} days of Criteo data. Expected at least two, the last of "
            "which is held out: day_0_dense.npy, day_0_sparse.npy, day_0_labels.npy and so on, as "
            "torchrec.datasets.scripts.npy_preproc_criteo makes them."
        )
    return [_day(folder / stem) for stem in sorted(stems, key=lambda stem: int(numbers[stem]))]


def _day(stem: Path) -> Day:
    files = {kind: _file(stem.with_name(f"{stem.name}_{kind}.npy"), kind) for kind in KINDS}
    if len({file.samples for file in files.values()}) > 1:
        found = ", ".join(f"{file.path.name} {file.samples:,}" for file in files.values())
        raise ValueError(f"{stem.parent}: the files of a day differ in their rows: {found}.")
    return Day(files)


def _file(path: Path, kind: str) -> File:
    try:
        values = map_npy(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an npy file, or truncated: {error}.") from error
    if values.dtype.name not in DTYPES[kind] or not values.dtype.isnative:
        raise ValueError(f"{path} holds {values.dtype}; expected {' or '.join(DTYPES[kind])}.")
    if values.ndim != 2 or values.shape[1] != COLUMNS[kind] or not len(values):
        expected = f"[samples, {COLUMNS[kind]}]"
        raise ValueError(f"{path} has the shape {list(values.shape)}; expected {expected}.")
    if not values.flags.c_contiguous:
        raise ValueError(f"{path} is stored by column; save np.ascontiguousarray of it.")
    if path.stat().st_size > values.offset + values.nbytes:
        raise ValueError(f"{path} is too long: {len(values):,} rows take less.")
    return File(path, values.dtype, len(values), COLUMNS[kind], values.offset)


class Days:
    """Days in a row as one sequence of samples, without the bad ones.

    Args:
        days: in order.
        bad: numbers of the samples to leave out, ascending, counted over the days.
    """

    def __init__(self, days: Sequence[Day], bad: NDArray[np.int64] | None = None) -> None:
        self.days = list(days)
        self.starts = np.cumsum([0, *(day.samples for day in days)])
        self.bad = np.zeros(0, np.int64) if bad is None else bad
        # The good sample before which each bad one lies.
        self._good_before = self.bad - np.arange(len(self.bad))

    def __len__(self) -> int:
        return int(self.starts[-1]) - len(self.bad)

    def pieces(self, start: int, stop: int) -> Iterable[tuple[Day, int, int]]:
        """The parts of the files with samples start to stop, bad ones counted."""
        for day, first in zip(self.days, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, day.samples)
            if low < high:
                yield day, int(low), int(high)

    def read(self, start: int, stop: int) -> Samples:
        """Samples start to stop of the good ones, start < stop."""
        first, last = (
            good + int(np.searchsorted(self._good_before, good, side="right"))
            for good in (start, stop - 1)
        )
        parts = [day.read(low, high) for day, low, high in self.pieces(first, last + 1)]
        bad = self.bad[np.searchsorted(self.bad, first) : np.searchsorted(self.bad, last)] - first
        samples = {}
        for kind in KINDS:
            values = np.concatenate([part[kind] for part in parts])
            samples[kind] = np.delete(values, bad, axis=0) if len(bad) else values
        return samples


class Batches:
    """This rank's share of each global batch, by its number.

    Batch k is samples [k * batch_size, (k + 1) * batch_size) of a sequence, and the ranks share it
    in order, so that what is trained does not depend on how many they are. No rank goes without:
    a rest of fewer samples than ranks is part of the batch before it.

    Args:
        days: the sequence.
        part: its samples start to stop.
        rows: of each table.
        modulo: whether ids are taken modulo the rows.
        batch_size: samples, all ranks.
        whole: leaves out what does not fill a batch.
        order_seed: takes the batches of each pass in another random order; None: in order.
    """

    def __init__(
        self,
        days: Days,
        part: range,
        *,
        rows: Sequence[int],
        modulo: bool,
        batch_size: int,
        whole: bool = False,
        order_seed: int | None = None,
    ) -> None:
        self._days, self._part, self._batch_size = days, part, batch_size
        self._modulo = np.array(rows) if modulo else None
        wide = any(day.files["sparse"].dtype == np.int64 for day in days.days)
        self._id_dtype = np.int64 if wide and not modulo else np.int32
        self._order_seed = order_seed
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        full, rest = divmod(len(part), batch_size)
        self._all = not whole
        self.steps = full if whole else max(full + (rest >= self._ranks), 1)
        """Batches in a pass."""

    def __getitem__(self, step: int) -> Batch:
        """Batch of a step, counted from 0 over all passes."""
        epoch, number = divmod(step, self.steps)
        if self._order_seed is not None:
            number = int(_order(self._order_seed, epoch, self.steps)[number])
        batch = self._part[number * self._batch_size :]
        if number < self.steps - 1 or not self._all:
            batch = batch[: self._batch_size]
        # As torch.tensor_split has it: the first ranks have one sample more.
        size, more = divmod(len(batch), self._ranks)
        start = batch.start + self._rank * size + min(self._rank, more)
        samples = self._days.read(start, start + size + (self._rank < more))
        ids = samples["sparse"]
        if self._modulo is not None:
            ids = ids % self._modulo
        ids_BF = torch.from_numpy(ids.astype(self._id_dtype, copy=False))
        dense_BD, labels_B = (torch.from_numpy(samples[kind]) for kind in ("dense", "labels"))
        return single_ids(DEFAULT_CAT_NAMES, ids_BF, dense_BD, labels_B.flatten())


def single_ids(names: list[str], ids_BF: Tensor, dense_BD: Tensor, labels_B: Tensor) -> Batch:
    """Samples (B) with one id for each feature (F)."""
    lengths = torch.ones(ids_BF.numel(), dtype=torch.int32)
    sparse = KeyedJaggedTensor(keys=names, values=ids_BF.T.flatten(), lengths=lengths)
    return Batch(dense_BD, sparse, labels_B)


@functools.lru_cache(maxsize=2)  # threads may be on either side of an epoch's end
def _order(seed: int, epoch: int, steps: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(steps)


def read_ahead(batches: Batches, steps: range, threads: int) -> Iterator[Batch]:
    """The batches of some steps in order, each thread one ahead. Pinned where there is a GPU.

    Threads, as reading files and copying arrays leave Python to others; processes would have to be
    told apart from the ranks by whoever sends signals to a job.
    """

    def read(step: int) -> Batch:
        batch = batches[step]
        return batch.pin_memory() if torch.cuda.is_available() else batch

    with ThreadPoolExecutor(threads, "read") as pool:
        pending: deque[Future[Batch]] = deque()
        for step in steps:
            pending.append(pool.submit(read, step))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
