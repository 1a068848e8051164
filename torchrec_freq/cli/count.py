"""The pre-pass: counts the ids of a data set into a file of counts.

The data are read once, in blocks; memory holds the counts (4 bytes a row) and a block. Row i of a
table counts the occurrences of id i, as count="samples" does in training. The file is loaded
with torchrec_freq.load_row_counts(model, *torchrec_freq.load_counts(path)).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tqdm import tqdm

from torchrec_freq.cli.arguments import add_counts_file, whole_numbers
from torchrec_freq.cli.terminal import visible
from torchrec_freq.counts.data_files import CRITEO_COLUMNS, DataFile, find_files, open_file
from torchrec_freq.counts.files import save_counts
from torchrec_freq.counts.ids import Tally
from torchrec_freq.output import check_output

HELP: Final = "count the ids of a data set (Criteo npy, Parquet) into a file of counts"


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
    files = [open_file(path) for path in find_files(arguments.data)]
    for file in files:
        if output.exists() and output.samefile(file.path):
            raise ValueError(f"{output}: is part of the data; name another output.")
    columns = _choose_columns(files, arguments.columns)
    names = _table_names(columns, arguments.table_names or [files[0].table_pattern])
    rows = _rows(names, arguments.rows)
    samples = sum(file.samples for file in files)
    if samples == 0:
        raise ValueError(f"{', '.join(map(str, arguments.data))}: no samples to count.")

    tally = Tally(rows, arguments.modulo)
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


def _choose_columns(files: Sequence[DataFile], chosen: Sequence[str] | None) -> list[str]:
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
