"""Files of ids, read in blocks: Criteo npy and Parquet."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

CRITEO_COLUMNS: Final = tuple(f"cat_{index}" for index in range(26))
"""Columns of a Criteo npy file, named as TorchRec's reader names its features."""

BLOCK_IDS: Final = 1 << 18
"""Ids read at once, over all columns. A block of lists holds as many on average."""

Block = tuple[int, dict[str, NDArray[Any]]]
"""Number of consecutive samples, and the ids in each of the columns."""


class DataFile(NamedTuple):
    """A file whose header has been checked.

    Attributes:
        columns: those that can hold ids.
        table_pattern: name of a column's table, where none is given.
        blocks: reads the columns named, in order.
    """

    path: Path
    samples: int
    columns: tuple[str, ...]
    table_pattern: str
    blocks: Callable[[Sequence[str]], Iterator[Block]]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The data files that the paths name, folders searched; all of one format."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder.")
        inside = []
        for pattern in ("**/*_sparse.npy", "**/*.parquet"):
            # Unlike Path.rglob it looks into folders that are links. A leading "." or "_" marks
            # other tools' unfinished and auxiliary files.
            names = sorted(glob.glob(pattern, root_dir=path, recursive=True))
            inside += [path / n for n in names if not any(p[0] in "._" for p in Path(n).parts)]
        inside = [file for file in inside if file.is_file()]
        if path.is_dir() and not inside:
            raise ValueError(f"{path}: no *_sparse.npy or *.parquet file in this folder.")
        found += inside if path.is_dir() else [path]
    seen: set[Path] = set()
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path}: a pipe or device; give a file.")
        if path.suffix not in _OPENERS:
            raise ValueError(f"{path}: neither .npy nor .parquet; convert it, or rename it.")
        if path.suffix != found[0].suffix:
            raise ValueError(
                f"{found[0]} and {path} are of different formats; count them separately."
            )
        if path.resolve() in seen:
            raise ValueError(f"{path}: named twice; its ids would count twice.")
        seen.add(path.resolve())
    return found


def open_file(path: Path) -> DataFile:
    """A file of :func:`find_files`, its header checked.

    Raises:
        ValueError: damaged, or not of the form that its name says; the message names the file.
    """
    return _OPENERS[path.suffix](path)


def map_npy(path: Path) -> np.memmap[Any, Any]:
    """The array of an npy file, mapped; of any shape and type.

    Raises:
        ValueError: truncated, or not an npy file.
        OSError: it cannot be read.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError):
        raise
    except Exception as error:  # NumPy has Python parse the header
        raise ValueError(str(error)) from error


def _open_npy(path: Path) -> DataFile:
    """A Criteo file, [samples, 26] whole numbers."""
    try:
        data = map_npy(path)
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or not an npy file: {error}") from error
    if path.stat().st_size > data.offset + data.nbytes:
        raise ValueError(f"{path}: too long: {len(data):,} samples take less.")
    if data.ndim != 2 or data.shape[1] != len(CRITEO_COLUMNS) or data.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: must hold whole numbers of shape [samples, {len(CRITEO_COLUMNS)}]; got "
            f"{data.dtype} of shape {list(data.shape)}. Name the sparse files, day_0_sparse.npy."
        )

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        step = max(BLOCK_IDS // len(CRITEO_COLUMNS), 1)
        data = map_npy(path)
        for start in range(0, len(data), step):
            block = np.asarray(data[start : start + step])
            yield len(block), {name: block[:, CRITEO_COLUMNS.index(name)] for name in columns}

    return DataFile(path, len(data), CRITEO_COLUMNS, "t_{column}", blocks)


def _open_parquet(path: Path) -> DataFile:
    """A Parquet file; its columns of whole numbers, or of lists of them, can hold ids."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or torchrec-freq[parquet]"
        ) from error

    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)

    def holds_ids(kind: Any) -> bool:
        return bool(pa.types.is_integer(kind.value_type if isinstance(kind, lists) else kind))

    try:
        with pq.ParquetFile(path) as file:
            samples, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a Parquet file: {error}") from error
    # A name that several columns have is refused where it is chosen.
    twice = {name for name in schema.names if schema.names.count(name) > 1}
    columns = tuple(f.name for f in schema if holds_ids(f.type) or f.name in twice)

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        try:
            # Mapped, not read: a row group may be larger than the memory.
            with pq.ParquetFile(path, memory_map=True) as file:
                step = _block_samples(file.metadata, columns)
                for batch in file.iter_batches(batch_size=step, columns=list(columns)):
                    ids: dict[str, NDArray[Any]] = {}
                    for column in columns:
                        values = batch.column(column)
                        # A missing list is an empty one; what a missing id stands for is not known.
                        values = values.flatten() if isinstance(values.type, lists) else values
                        if values.null_count:
                            raise ValueError(
                                f"{path}: column {column!r} has missing ids (null). Fill them as "
                                "training does, or drop them."
                            )
                        ids[column] = values.to_numpy()
                    yield batch.num_rows, ids
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error

    return DataFile(path, samples, columns, "{column}", blocks)


_OPENERS: Final = {".npy": _open_npy, ".parquet": _open_parquet}


def _block_samples(metadata: Any, columns: Sequence[str]) -> int:
    """Samples of a Parquet file with about ``BLOCK_IDS`` ids."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    prefixes = tuple(f"{column}." for column in columns)  # lists are columns within columns
    ids = sum(c.num_values for c in chunks if f"{c.path_in_schema}.".startswith(prefixes))
    samples: int = BLOCK_IDS * metadata.num_rows // max(ids, 1)
    return max(samples, 1)
