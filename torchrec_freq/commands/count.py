"""The pre-pass: counts the ids of a data set into a file of counts.

The data are read once, in blocks; memory holds the counts (4 bytes a row) and a block. Row i of a
table counts the occurrences of id i, as count="samples" does in training. The file is loaded
with torchrec_freq.load_row_counts(model, *torchrec_freq.load_counts(path)).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from torchrec_freq.commands.arguments import add_counts_file, whole_numbers
from torchrec_freq.commands.terminal import visible
from torchrec_freq.engine.counters import COUNT_CEILING, count_occurrences_
from torchrec_freq.files import save_counts
from torchrec_freq.output import check_output

HELP: Final = "count the ids of a data set (Criteo npy, Parquet) into a file of counts"

CRITEO_COLUMNS: Final = tuple(f"cat_{index}" for index in range(26))
"""Columns of a Criteo npy file, named as TorchRec's reader names its features."""

BLOCK_IDS: Final = 1 << 18
"""Ids read at once, over all columns. A block of lists holds as many on average."""

# Ids counted at once: bounds what a large batch needs besides itself.
_CHUNK_IDS: Final = 1 << 22


def count_ids(
    batches: Iterable[Mapping[str, Tensor | NDArray[Any]]],
    rows: Mapping[str, int],
    *,
    modulo: bool = False,
) -> dict[str, Tensor]:
    """Counts ids, batch by batch.

    >>> counts = count_ids([{"item": torch.tensor([2, 0, 2])}], {"item": 4})
    >>> counts["item"].tolist()
    [1, 0, 2, 0]

    Args:
        batches: table name -> ids of any shape and whole-number dtype. Tables may be missing in a
            batch; only one batch is held at a time.
        rows: number of rows of each table, at least 1.
        modulo: takes ids modulo the table's rows (never negative), as TorchRec's Criteo reader
            does with ``hashes``, instead of refusing ids out of range.

    Returns:
        table name -> int32 CPU tensor [rows]: occurrences of each id, at most
        ``torchrec_freq.COUNT_CEILING``.

    Raises:
        ValueError: an unknown table, ids that are not whole numbers, an id out of range, a number
            of rows below 1 or too large for the memory; the message names table and batch.
    """
    tally = _Tally(rows, modulo)
    for number, batch in enumerate(batches):
        for table, ids in batch.items():
            tally.add(table, ids, f"batch {number}")
    return tally.counts()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    parser.add_argument(
        "data",
        nargs="+",
        type=Path,
        help="files or folders: .npy of shape [samples, 26] (a folder's *_sparse.npy files), or "
        ".parquet (with pyarrow), but not both",
    )
    add_counts_file(parser)
    parser.add_argument(
        "--rows",
        type=whole_numbers,
        required=True,
        metavar="N[,N...]",
        help="num_embeddings of the tables: one number for all, or one for each table, in order",
    )
    parser.add_argument(
        "--columns",
        type=_names,
        metavar="NAME[,NAME...]",
        help="columns that hold ids: whole numbers, or lists of them. Needed for Parquet; npy has "
        "cat_0 to cat_25 (default: all)",
    )
    parser.add_argument(
        "--table-names",
        type=_names,
        metavar="NAME[,NAME...]",
        help="the model's table of each column, in the order of the columns, or one pattern for "
        "all. Columns of one table are counted together (default: t_{column} for npy, as in "
        "TorchRec's DLRM examples, {column} for Parquet)",
    )
    parser.add_argument(
        "--modulo",
        action="store_true",
        help="take ids modulo the table's rows, as TorchRec's Criteo reader does with hashes "
        "(default: an id out of range is an error)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Counts the data set that the command line names, and writes the file.

    Raises:
        ValueError: wrong arguments or data; the message names the file. Nothing is written.
        OSError: a file cannot be read or written.
    """
    output: Path = arguments.output
    check_output(output)
    # A bad file is found here, not after hours of counting.
    files = [_open(path) for path in _find(arguments.data)]
    for file in files:
        if output.exists() and output.samefile(file.path):
            raise ValueError(f"{output}: is part of the data; name another output.")
    columns = _choose_columns(files, arguments.columns)
    names = _table_names(columns, arguments.table_names or [files[0].table_pattern])
    rows = _rows(names, arguments.rows)
    samples = sum(file.samples for file in files)
    if samples == 0:
        raise ValueError(f"{', '.join(map(str, arguments.data))}: no samples to count.")

    tally = _Tally(rows, arguments.modulo)
    # Without a terminal no bar is drawn.
    with tqdm(total=samples, unit=" samples", unit_scale=True, disable=None) as bar:
        for file in files:
            start = 0
            for block in file.blocks(columns):
                where = f"{file.path}, samples {start} to {start + block.samples - 1}"
                for column, ids in block.ids.items():
                    tally.add(names[column], ids, f"{where}, column {column!r}")
                start += block.samples
                bar.update(block.samples)
            if start != file.samples:
                raise ValueError(f"{file.path}: ends after {start} of {file.samples} samples.")
    save_counts(output, tally.counts())
    print(f"{visible(str(output))}: {len(rows)} tables, {samples:,} samples, {tally.ids:,} ids")


class _Tally:
    """Counters of the tables, on the CPU."""

    def __init__(self, rows: Mapping[str, int], modulo: bool) -> None:
        self.rows = dict(rows)
        self.modulo = modulo
        self.ids = 0
        self._added = 0
        self._counts: dict[str, Tensor] = {}
        for table, count in self.rows.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"Table {table!r}: rows must be a whole number >= 1; got {count}.")
            try:
                self._counts[table] = torch.zeros(count, dtype=torch.int32)
            except (RuntimeError, TypeError) as error:  # the latter from 2^63 rows on
                raise ValueError(
                    f"Table {table!r}: no memory for the counts of {count} rows ({4 * count} bytes)"
                    ". Count fewer tables at once."
                ) from error

    def add(self, table: str, ids: Tensor | NDArray[Any], where: str) -> None:
        """Counts ids of any shape; ``where`` says in errors where they come from."""
        if table not in self.rows:
            raise ValueError(f"{where}: no table {table!r}; tables: {', '.join(self.rows)}.")
        ids_L = (ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids).reshape(-1)
        if ids_L.dtype.kind not in "iu":
            raise ValueError(f"{where}: ids must be whole numbers; got {ids_L.dtype}.")
        for start in range(0, ids_L.size, _CHUNK_IDS):
            rows_L = self._rows(table, ids_L[start : start + _CHUNK_IDS], where)
            ones_L = torch.ones(len(rows_L), dtype=torch.int32)
            count_occurrences_(self._counts[table], torch.from_numpy(rows_L), ones_L)
            self._added += len(rows_L)
            if self._added >= COUNT_CEILING:  # before int32 ends
                self._clamp()
        self.ids += ids_L.size

    def counts(self) -> dict[str, Tensor]:
        """int32 [rows] counts of each table: views, so call it last."""
        self._clamp()
        return dict(self._counts)

    def _clamp(self) -> None:
        for counts_R in self._counts.values():
            counts_R.clamp_(max=COUNT_CEILING)
        self._added = 0

    def _rows(self, table: str, ids_L: NDArray[Any], where: str) -> NDArray[np.int64]:
        """int64 [ids] row numbers."""
        rows = self.rows[table]
        # uint64 alone has numbers that int64 has not.
        wide_L = ids_L if ids_L.dtype == np.uint64 else ids_L.astype(np.int64)
        least, most = int(wide_L.min()), int(wide_L.max())
        if least < 0 or most >= rows:
            if not self.modulo:
                raise ValueError(
                    f"{where}: id {least if least < 0 else most} is out of range: table {table!r} "
                    f"has {rows} rows, for ids of 0 to {rows - 1}. Give more rows, or modulo if "
                    "training takes ids modulo the rows."
                )
            wide_L = wide_L % wide_L.dtype.type(rows)
        return wide_L.astype(np.int64, copy=False)


@dataclass(frozen=True)
class _Block:
    """Consecutive samples of a file, and the ids in each of the columns."""

    samples: int
    ids: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _DataFile:
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
    blocks: Callable[[Sequence[str]], Iterator[_Block]]


def _find(paths: Sequence[Path]) -> list[Path]:
    """The data files that the paths name, folders searched; all of one format."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = [
            file
            for file in sorted([*path.rglob("*_sparse.npy"), *path.rglob("*.parquet")])
            # Other tools' unfinished and auxiliary files.
            if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
            and file.is_file()
        ]
        if not inside:
            raise ValueError(f"{path}: no *_sparse.npy or *.parquet file in this folder.")
        found += inside
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path}: a pipe or device; give a file.")
        if path.suffix not in _OPENERS:
            raise ValueError(f"{path}: neither .npy nor .parquet; convert it, or rename it.")
        if path.suffix != found[0].suffix:
            raise ValueError(
                f"{found[0]} and {path} are of different formats; count them separately."
            )
    seen: dict[Path, Path] = {}
    for path in found:
        if path.resolve() in seen:
            raise ValueError(f"{path}: named twice; its ids would count twice.")
        seen[path.resolve()] = path
    return found


def _open(path: Path) -> _DataFile:
    return _OPENERS[path.suffix](path)


def _open_npy(path: Path) -> _DataFile:
    """A Criteo file, [samples, 26] whole numbers."""

    def open_file() -> NDArray[Any]:
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: truncated, or not an npy file: {error}") from error

    data = open_file()
    if data.ndim != 2 or data.shape[1] != len(CRITEO_COLUMNS) or data.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: must hold whole numbers of shape [samples, {len(CRITEO_COLUMNS)}]; got "
            f"{data.dtype} of shape {list(data.shape)}. Name the sparse files, day_0_sparse.npy."
        )

    def blocks(columns: Sequence[str]) -> Iterator[_Block]:
        indices = [(column, CRITEO_COLUMNS.index(column)) for column in columns]
        step = max(BLOCK_IDS // len(CRITEO_COLUMNS), 1)
        data = open_file()
        for start in range(0, len(data), step):
            block = np.asarray(data[start : start + step])
            yield _Block(len(block), {column: block[:, index] for column, index in indices})

    return _DataFile(path, len(data), CRITEO_COLUMNS, "t_{column}", blocks)


def _open_parquet(path: Path) -> _DataFile:
    """A Parquet file; its columns of whole numbers, or of lists of them, can hold ids."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or torchrec-freq[parquet]"
        ) from error

    def is_list(kind: Any) -> bool:
        return bool(
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        )

    def holds_ids(kind: Any) -> bool:
        return bool(pa.types.is_integer(kind.value_type if is_list(kind) else kind))

    try:
        with pq.ParquetFile(path) as file:
            samples = file.metadata.num_rows
            schema = file.schema_arrow
            columns = tuple(
                field.name
                for field in schema
                if holds_ids(field.type) or len(schema.get_all_field_indices(field.name)) > 1
            )
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a Parquet file: {error}") from error

    def blocks(columns: Sequence[str]) -> Iterator[_Block]:
        try:
            # Mapped, not read: a row group may be larger than the memory.
            with pq.ParquetFile(path, memory_map=True) as file:
                step = _block_samples(file.metadata, columns)
                for batch in file.iter_batches(batch_size=step, columns=list(columns)):
                    ids: dict[str, NDArray[Any]] = {}
                    for column in columns:
                        values = batch.column(column)
                        # A missing list is an empty one; what a missing id stands for is not known.
                        values = values.flatten() if is_list(values.type) else values
                        if values.null_count:
                            raise ValueError(
                                f"{path}: column {column!r} has missing ids (null). Fill them as "
                                "training does, or drop them."
                            )
                        ids[column] = values.to_numpy()
                    yield _Block(batch.num_rows, ids)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error

    return _DataFile(path, samples, columns, "{column}", blocks)


_OPENERS: Final = {".npy": _open_npy, ".parquet": _open_parquet}


def _block_samples(metadata: Any, columns: Sequence[str]) -> int:
    """Samples of a Parquet file with about ``BLOCK_IDS`` ids."""
    ids = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            if chunk.path_in_schema.split(".")[0] in columns:
                ids += chunk.num_values
    samples: int = metadata.num_rows
    return max(BLOCK_IDS * samples // max(ids, 1), 1)


def _choose_columns(files: Sequence[_DataFile], chosen: Sequence[str] | None) -> list[str]:
    if chosen is None:
        if files[0].columns is not CRITEO_COLUMNS:
            raise ValueError(
                f"{files[0].path}: say which columns hold ids (--columns). Columns of whole "
                f"numbers: {', '.join(files[0].columns) or 'none'}."
            )
        return list(CRITEO_COLUMNS)
    for file in files:
        for column in chosen:
            if file.columns.count(column) > 1:
                raise ValueError(
                    f"{file.path}: several columns are named {column!r}; rename all but one."
                )
            if column not in file.columns:
                raise ValueError(
                    f"{file.path}: no column {column!r} of whole numbers or lists of them. Such "
                    f"columns: {', '.join(file.columns) or 'none'}."
                )
    for column in chosen:
        if chosen.count(column) > 1:
            raise ValueError(f"Column {column!r} is named twice; its ids would count twice.")
    return list(chosen)


def _table_names(columns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Table of each column."""
    if len(names) == 1:
        names = [names[0].replace("{column}", column) for column in columns]
    if len(names) != len(columns):
        raise ValueError(
            f"--table-names has {len(names)} names for {len(columns)} columns: give one for each "
            "column, or one pattern such as t_{column}."
        )
    return dict(zip(columns, names, strict=True))


def _rows(names: Mapping[str, str], rows: Sequence[int]) -> dict[str, int]:
    """Rows of each table."""
    tables = list(dict.fromkeys(names.values()))
    if len(rows) not in (1, len(tables)):
        raise ValueError(
            f"--rows has {len(rows)} numbers for {len(tables)} tables ({', '.join(tables)}): give "
            "one for each table, or one for all."
        )
    return dict(zip(tables, rows if len(rows) > 1 else list(rows) * len(tables), strict=True))


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names
