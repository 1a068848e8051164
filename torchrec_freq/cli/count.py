"""The pre-pass: counts the ids of a data set into a file of counts.

The data are read once, in blocks; memory holds the counts (4 bytes a row) and a block. Row i of a
table counts the occurrences of id i, as count="samples" does in training. The file is loaded
with torchrec_freq.load_row_counts(model, *torchrec_freq.load_counts(path)).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torchrec_freq.cli.arguments import add_counts_file, names, one_each, whole_numbers
from torchrec_freq.cli.terminal import progress, visible
from torchrec_freq.counts.data_files import CRITEO_COLUMNS, DataFile, find_files, open_file
from torchrec_freq.counts.files import save_counts
from torchrec_freq.counts.ids import Tally
from torchrec_freq.output import check_output

HELP: Final = "count the ids of a data set (Criteo npy, Parquet) into a file of counts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    add = parser.add_argument
    data_help = (
        "files or folders: .npy of shape [samples, 26] (a folder's *_sparse.npy files), or "
        ".parquet (with pyarrow), but not both"
    )
    rows_help = "num_embeddings of the tables: one number for all, or one for each table, in order"
    columns_help = (
        "columns that hold ids: whole numbers, or lists of them. Needed for Parquet; npy has cat_0 "
        "to cat_25 (default: all)"
    )
    tables_help = (
        "the model's table of each column, in the order of the columns, or one pattern for all. "
        "Columns of one table are counted together (default: t_{column} for npy, as in TorchRec's "
        "DLRM examples, {column} for Parquet)"
    )
    modulo_help = (
        "take ids modulo the table's rows, as TorchRec's Criteo reader does with hashes (default: "
        "an id out of range is an error)"
    )
    add("data", nargs="+", type=Path, help=data_help)
    add_counts_file(parser)
    add("--rows", type=whole_numbers, required=True, metavar="N[,N...]", help=rows_help)
    add("--columns", type=names, metavar="NAME[,NAME...]", help=columns_help)
    add("--table-names", type=names, metavar="NAME[,NAME...]", help=tables_help)
    add("--modulo", action="store_true", help=modulo_help)


def run(arguments: argparse.Namespace) -> None:
    """Counts the data set that the command line names, and writes the file."""
    output: Path = arguments.output
    check_output(output)
    # A bad file is found here, not after hours of counting.
    files = [open_file(path) for path in find_files(arguments.data)]
    if output.exists() and any(output.samefile(file.path) for file in files):
        raise ValueError(f"{output}: is part of the data; name another output.")
    columns = _choose_columns(files, arguments.columns)
    patterns = arguments.table_names or [files[0].table_pattern]
    patterns = one_each("--table-names", patterns, "columns", columns)
    tables = {column: pattern.replace("{column}", column) for column, pattern in patterns.items()}
    rows = one_each("--rows", arguments.rows, "tables", list(dict.fromkeys(tables.values())))
    samples = sum(file.samples for file in files)
    if samples == 0:
        raise ValueError(f"{', '.join(map(str, arguments.data))}: no samples to count.")

    tally = Tally(rows, arguments.modulo)
    with progress(samples, "samples") as bar:
        for file in files:
            start = 0
            for count, block in file.blocks(columns):
                where = f"{file.path}, samples {start} to {start + count - 1}"
                for column, ids in block.items():
                    tally.add(tables[column], ids, f"{where}, column {column!r}")
                start += count
                bar.update(count)
            if start != file.samples:
                raise ValueError(f"{file.path}: ends after {start} of {file.samples} samples.")
    save_counts(output, tally.counts())
    print(f"{visible(str(output))}: {len(rows)} tables, {samples:,} samples, {tally.ids:,} ids")


def _choose_columns(files: Sequence[DataFile], chosen: Sequence[str] | None) -> Sequence[str]:
    if chosen is None:
        if files[0].columns is not CRITEO_COLUMNS:
            raise ValueError(
                f"{files[0].path}: say which columns hold ids (--columns). Columns of whole "
                f"numbers: {', '.join(files[0].columns) or 'none'}."
            )
        return CRITEO_COLUMNS
    for column in chosen:
        if chosen.count(column) > 1:
            raise ValueError(f"Column {column!r} is named twice; its ids would count twice.")
        for file in files:
            if file.columns.count(column) > 1:
                raise ValueError(
                    f"{file.path}: several columns are named {column!r}; rename all but one."
                )
            if column not in file.columns:
                raise ValueError(
                    f"{file.path}: no column {column!r} of whole numbers or lists of them. Such "
                    f"columns: {', '.join(file.columns) or 'none'}."
                )
    return chosen
