"""Criteo npy files as one sequence of samples.

A day is three files as TorchRec makes them: day_0_dense.npy float32 [n, 13], day_0_sparse.npy int32
or int64 [n, 26], and day_0_labels.npy int32 [n, 1].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, INT_FEATURE_COUNT
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq.counts.data_files import map_npy

KINDS: Final = {
    "dense": (("float32",), INT_FEATURE_COUNT),
    "sparse": (("int32", "int64"), CAT_FEATURE_COUNT),
    "labels": (("int32",), 1),
}
"""Of files: the types of their values, and their columns."""

Samples = dict[str, NDArray[Any]]
"""Kind -> values [n, columns]."""


@dataclass(frozen=True)
class Day:
    """The three files of a day, of equally many samples; mapped, so a slice is read when used."""

    files: dict[str, "np.memmap[Any, Any]"]  # by kind

    @property
    def samples(self) -> int:
        return len(self.files["dense"])

    def path(self, kind: str) -> Path:
        return Path(str(self.files[kind].filename))


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
    if len({len(values) for values in files.values()}) > 1:
        found = ", ".join(f"{stem.name}_{kind}.npy {len(files[kind]):,}" for kind in KINDS)
        raise ValueError(f"{stem.parent}: the files of a day differ in their rows: {found}.")
    return Day(files)


def _file(path: Path, kind: str) -> "np.memmap[Any, Any]":
    try:
        values = map_npy(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an npy file, or truncated: {error}.") from error
    types, columns = KINDS[kind]
    if values.dtype.name not in types or not values.dtype.isnative:
        raise ValueError(f"{path} holds {values.dtype}; expected {' or '.join(types)}.")
    if values.ndim != 2 or values.shape[1] != columns or not len(values):
        expected = f"[samples, {columns}]"
        raise ValueError(f"{path} has the shape {list(values.shape)}; expected {expected}.")
    if path.stat().st_size > values.offset + values.nbytes:
        raise ValueError(f"{path} is too long: {len(values):,} rows take less.")
    return values


class Days:
    """Days in a row as one sequence of samples.

    Args:
        days: in order.
    """

    def __init__(self, days: Sequence[Day]) -> None:
        self.days = list(days)
        self._starts = np.cumsum([0, *(day.samples for day in days)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pieces(self, start: int, stop: int) -> Iterable[tuple[Day, slice]]:
        """The parts of the days with samples start to stop."""
        for day, first in zip(self.days, self._starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, day.samples)
            if low < high:
                yield day, slice(int(low), int(high))

    def read(self, start: int, stop: int) -> Samples:
        """Samples start to stop, start < stop."""
        parts = list(self.pieces(start, stop))
        return {kind: np.concatenate([day.files[kind][p] for day, p in parts]) for kind in KINDS}


def single_ids(names: list[str], ids_BF: Tensor, dense_BD: Tensor, labels_B: Tensor) -> Batch:
    """Samples (B) with one id for each feature (F)."""
    lengths = torch.ones(ids_BF.numel(), dtype=torch.int32)
    sparse = KeyedJaggedTensor(keys=names, values=ids_BF.T.flatten(), lengths=lengths)
    return Batch(dense_BD, sparse, labels_B)
