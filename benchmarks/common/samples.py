"""Labelled samples with one id a feature, as arrays in memory or in the files of a folder."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Array = NDArray[Any]
ARRAYS = ("ids", "dense", "labels", "order")
IN_MEMORY = 2**30  # bytes; a larger array is mapped from its file


@dataclass(frozen=True)
class Samples:
    """N samples with F sparse features.

    Attributes:
        tables: sparse feature -> rows of its table.
        ids: int32 [N, F].
        dense: float32 [N, dense features], at least one.
        labels: uint8 [N], 0 or 1.
        order: int64 [N] numbers of the samples in the order of time.
        about: what they were made from, to be told from other samples by.
    """

    tables: dict[str, int]
    ids: Array
    dense: Array
    labels: Array
    order: Array
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, folder: Path) -> None:
        """Writes them into a folder that does not exist; a run that is cut off leaves none."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            for name in ARRAYS:
                np.save(made / f"{name}.npy", getattr(self, name))
            seal(made, self.tables, self.about)
            made.rename(folder)


def seal(folder: Path, tables: Mapping[str, int], about: Mapping[str, Any]) -> None:
    """Completes a folder that holds the arrays."""
    text = json.dumps({"tables": tables, "about": about})
    (folder / "samples.json").write_text(text, encoding="utf-8")


def load(folder: Path) -> Samples:
    """What `Samples.save` wrote, or `seal` completed."""
    known = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    paths = {name: folder / f"{name}.npy" for name in ARRAYS}
    arrays = {
        name: np.load(path, mmap_mode="r" if path.stat().st_size > IN_MEMORY else None)
        for name, path in paths.items()
    }
    return Samples(**known, **arrays)


def number(values: Any) -> Array:
    """int64 [N] numbers of the distinct values, 0, 1, ... in the order of their first occurrence.

    Args:
        values: [N] an array of NumPy or Arrow; a missing value is one of its own.
    """
    encoded = pc.dictionary_encode(
        pa.chunked_array(values) if isinstance(values, pa.ChunkedArray) else pa.array(values),
        null_encoding="encode",
    )
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    codes: Array = encoded.indices.to_numpy().astype(np.int64)
    return codes


def cross(first: Array, second: Array) -> Array:
    """int64 [N] numbers of the pairs of two features' numbers."""
    return number(first * (int(second.max()) + 1) + second)


def make(features: Mapping[str, Array], labels: Array, dense: Array | None = None) -> Samples:
    """Samples in the order of time, from the numbers of each feature's values.

    Args:
        dense: [N, dense features]; standardised. None: a constant, as models want an input.
    """
    count = len(labels)
    values = np.ones((count, 1)) if dense is None else dense - dense.mean(axis=0)
    if dense is not None:
        values = values / np.maximum(values.std(axis=0), 1e-6)
    return Samples(
        tables={name: int(codes.max()) + 1 for name, codes in features.items()},
        ids=np.stack(list(features.values()), axis=1).astype(np.int32),
        dense=values.astype(np.float32),
        labels=labels.astype(np.uint8),
        order=np.arange(count),
    )
