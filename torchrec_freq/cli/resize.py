"""A checkpoint with other tables: grown, shrunk, renamed, or with their rows in another order.

Reads a checkpoint of torch.distributed.checkpoint, of any sharding plan, and writes a new one. A
row that is kept keeps its weights, its count and its sum of squares, and so its rate. A new row has
TorchRec's initial weights, and 0 in the optimizer's state. The optimizer may be FrequencySGD,
TorchRec's row-wise Adagrad, or another one whose state has a value for each row. Other tables and
all else are copied.

Among the new files is TABLE.mapping.npy for each table that lost rows or reordered them: int64
[old rows], the new row of each old one, -1 where it is lost.

Memory holds about 40 bytes for each row of the largest table, and 200 MB, but not its weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from torchrec_freq.cli.arguments import whole_number
from torchrec_freq.cli.resize_tables import StoredRows
from torchrec_freq.cli.terminal import progress, visible
from torchrec_freq.counts.data_files import map_npy
from torchrec_freq.counts.dcp_files import Checkpoint
from torchrec_freq.counts.state import COUNT_CEILING, ROW_COUNTER
from torchrec_freq.counts.stored import open_stored
from torchrec_freq.output import CheckpointWriter, check_new, writing_folder
from torchrec_freq.vocabulary import budget_rows, histogram, keep_counted, keep_rows, rows_of

HELP: Final = "write a checkpoint with other tables: grow, shrink, rename, reorder"

_CHOOSING: Final = ("keep", "least_count", "map")
_OPTIONS: Final = (*_CHOOSING, "rows", "rename")
_UNITS: Final = {
    f"{unit}{binary}B": (1024 if binary else 1000) ** power
    for power, unit in enumerate(("", "K", "M", "G", "T"))
    for binary in ("", "i")
}

CountsOf = Callable[[str, int], Tensor | None]
"""Counts of a table, by its name and its rows; None where there are none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that holds .metadata")
    add("-o", "--output", type=Path, required=True, metavar="NEW", help="folder to write")
    rows_help = (
        "rows of the new table: all old ones and new ones behind them, or the first of the old "
        "ones. Beside --keep, --least-count or --map: rows with those for new ids"
    )
    map_help = (
        "the new row of each old one: whole numbers [old rows], -1 where it is lost. Without "
        "--rows, the new table has no other rows"
    )
    for option, kind, form, text in (
        ("--rows", whole_number, "TABLE=N", rows_help),
        ("--keep", whole_number, "TABLE=N", "keep so many rows, those with the largest counts"),
        ("--least-count", whole_number, "TABLE=N", "keep the rows with at least this count"),
        ("--map", Path, "TABLE=FILE", map_help),
        ("--rename", _table_name, "TABLE=NAME", "the table's new name"),
    ):
        by_table = partial(_by_table, kind)
        add(option, type=by_table, action="append", default=[], metavar=form, help=text)
    budget_help = (
        "keep the rows of all tables with the largest counts per byte, in so many bytes of weights "
        "and optimizer state, as 20GB or 20GiB"
    )
    admit_help = "the optimizer's option; with --budget, rows with smaller counts go first"
    counts_help = (
        "file of counts to choose rows by, as the command count writes it (default: the "
        "checkpoint's own counts; row-wise Adagrad has none)"
    )
    add("--budget", type=_bytes, metavar="SIZE", help=budget_help)
    add("--admit", type=whole_number, default=1, metavar="N", help=admit_help)
    add("--counts", type=Path, metavar="FILE", help=counts_help)


def run(arguments: argparse.Namespace) -> None:
    """Writes the checkpoint that the command line asks for."""
    output: Path = arguments.output
    check_new(output)
    checkpoint = Checkpoint(arguments.checkpoint)
    for key in checkpoint.stored:
        checkpoint.check(key)
    changes = _changes(checkpoint, arguments)
    new_keys = {k: new for c in changes for k, new in c.stored.new_keys(c.new_name).items()}
    copied = [key for key in checkpoint.stored if key not in new_keys]
    if len({*copied, *new_keys.values()}) < len(checkpoint.stored):
        raise ValueError(f"--rename: {checkpoint.folder} already has a table of that name.")
    size = sum(change.rows * change.stored.row_bytes for change in changes)
    size += sum(map(checkpoint.bytes_of, copied))
    if size > (free := shutil.disk_usage(output.absolute().parent).free):
        raise ValueError(f"{output}: needs {size:,} bytes; the disk has {free:,} left.")
    with writing_folder(output) as folder, progress(size, "B") as bar:
        writer = CheckpointWriter(folder)
        for key in copied:
            writer.copy(key, checkpoint.stored[key], checkpoint.raw(key))
            bar.update(checkpoint.bytes_of(key))
        for change in changes:
            bar.set_description(visible(change.name))
            old_rows = change.choose()
            change.stored.write(writer, change.new_name, change.rows, old_rows, bar.update)
            if old_rows is not None or change.rows < change.stored.rows:
                file = folder / f"{quote(change.new_name, safe='')}.mapping.npy"
                np.save(file, change.mapping(old_rows).numpy())
        writer.finish(_paths(checkpoint.metadata.planner_data, new_keys))
    for line in _report(changes):
        print(visible(line))
    print(f"{visible(str(output))}: {size:,} bytes")


@dataclass(frozen=True)
class Change:
    """What becomes of a table.

    Attributes:
        name: of the old table, among those of the checkpoint.
        new_name: within its collection.
        stored: the old table.
        rows: of the new table.
        choose: gives the old row of each new one, as :meth:`StoredRows.write` wants it.
        kept: old rows that are kept.
        coverage: share of the lookups that these had; None where it is not known.
    """

    name: str
    new_name: str
    stored: StoredRows
    rows: int
    choose: Callable[[], Tensor | None]
    kept: int
    coverage: float | None

    def mapping(self, old_rows: Tensor | None) -> Tensor:
        """int64 [old rows]: the new row of each old one, -1 where it is lost."""
        mapping_R = torch.arange(self.stored.rows)
        if old_rows is None:
            return mapping_R.where(mapping_R < self.rows, -1)
        known = old_rows >= 0
        return mapping_R.fill_(-1).index_put_((old_rows[known],), known.nonzero().flatten())


def _changes(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[Change]:
    """What the command line asks for, checked."""
    tables = {keys.name: keys for keys in checkpoint.tables()}
    options = {option: _by_name(option, arguments, list(tables)) for option in _OPTIONS}
    counts = _counts(checkpoint, arguments.counts)
    if arguments.budget is not None:
        if used := [option for option in (*_CHOOSING, "rows") if options[option]]:
            raise ValueError(
                f"--budget chooses the rows of all tables: leave out {_flag(used[0])}."
            )
        stored = {name: StoredRows(checkpoint, keys) for name, keys in tables.items()}
        histograms = {n: histogram(_required(counts, n, t.rows)) for n, t in stored.items()}
        sizes = {name: table.row_bytes for name, table in stored.items()}
        options["keep"] = budget_rows(histograms, sizes, arguments.budget, arguments.admit)
    changes = []
    for name, keys in tables.items():
        if mine := {option: values[name] for option, values in options.items() if name in values}:
            changes.append(_change(name, StoredRows(checkpoint, keys), counts, mine))
    if not changes:
        raise ValueError("Nothing to change: give --rows, --keep, --budget, --rename or the like.")
    return changes


def _change(name: str, table: StoredRows, counts: CountsOf, options: Mapping[str, Any]) -> Change:
    """What becomes of a table by its options."""
    if len(used := [_flag(option) for option in _CHOOSING if option in options]) > 1:
        raise ValueError(f"Table {name!r}: {' and '.join(used)} each choose its rows; give one.")
    choose = partial(_choose, name, table.rows, counts, options)
    chosen = choose()
    rows = options.get("rows", table.rows if chosen is None else len(chosen))
    if chosen is not None and len(chosen) > rows:
        raise ValueError(f"--rows: table {name!r} keeps {len(chosen)} rows; {rows} are too few.")
    kept = torch.arange(min(rows, table.rows)) if chosen is None else chosen[chosen >= 0]
    coverage = None
    if (counts_R := counts(name, table.rows)) is not None:
        total = int(counts_R.sum())
        coverage = int(counts_R[kept].sum()) / total if total else 1.0
    new_name = options.get("rename", table.table)
    return Change(name, new_name, table, rows, choose, len(kept), coverage)


def _choose(name: str, rows: int, counts: CountsOf, options: Mapping[str, Any]) -> Tensor | None:
    """int64: the old row of each new one, -1 for a new id; None for the first rows."""
    for option, keep in (("keep", keep_rows), ("least_count", keep_counted)):
        if option in options:
            return keep({name: _required(counts, name, rows)}, {name: options[option]})[name].rows
    if "map" not in options:
        return None
    path: Path = options["map"]
    try:
        mapping = torch.from_numpy(np.array(map_npy(path)))
        if mapping.shape != (rows,):
            raise ValueError(
                f"must have a number for each of {rows} rows; got {list(mapping.shape)}."
            )
        return rows_of(mapping, options.get("rows"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no mapping of table {name!r}: {error}") from error


def _counts(checkpoint: Checkpoint, file: Path | None) -> CountsOf:
    """Reads counts from a file, where one is given, or else from the checkpoint."""
    keys = {table.name: table.states.get(ROW_COUNTER) for table in checkpoint.tables()}
    stored = None if file is None else {table.name: table for table in open_stored(file)}

    @functools.lru_cache(maxsize=1)  # those of a table are wanted some times in a row
    def counts(name: str, rows: int) -> Tensor | None:
        if stored is None:
            if (key := keys[name]) is None:
                return None
            # A counter may be above the ceiling until it is clamped.
            return checkpoint.read(key).clamp_(max=COUNT_CEILING)
        if name not in stored:
            return None
        if stored[name].rows != rows:
            raise ValueError(
                f"{file} has {stored[name].rows} counts of table {name!r}, which has {rows} rows."
            )
        return torch.cat([part for _, part, _ in stored[name].blocks() if part is not None])

    return counts


def _required(counts: CountsOf, name: str, rows: int) -> Tensor:
    counts_R = counts(name, rows)
    if counts_R is None:
        raise ValueError(
            f"There are no counts of table {name!r} to choose its rows by. Name a file of them, as "
            "`python -m torchrec_freq count` writes it: --counts."
        )
    return counts_R


def _paths(paths: Any, new_keys: Mapping[str, str]) -> Any:
    """DCP's planner data: where each flat key is in the state that was saved, by the new keys."""
    if not isinstance(paths, dict):
        return paths
    found = {}
    for key, path in paths.items():
        parts = iter(new_keys.get(key, key).split("."))  # as many as there were: names have no dots
        new = tuple(".".join(itertools.islice(parts, str(p).count(".") + 1)) for p in path)
        found[new_keys.get(key, key)] = new if key in new_keys else path
    return found


def _report(changes: Sequence[Change]) -> Iterator[str]:
    """A table of what is kept and lost."""
    form = "{:<24} {:>13} {:>13} {:>13} {:>13} {:>13} {:>16}"
    yield form.format("table", "rows", "kept", "lost", "new", "lookups kept", "bytes")
    for change in changes:
        renamed = change.new_name != change.stored.table
        numbers = (change.rows, change.kept, change.stored.rows - change.kept)
        yield form.format(
            f"{change.name} -> {change.new_name}" if renamed else change.name,
            *(f"{number:,}" for number in (*numbers, change.rows - change.kept)),
            "unknown" if change.coverage is None else f"{change.coverage:.2%}",
            f"{change.rows * change.stored.row_bytes:,}",
        )


def _by_name(option: str, arguments: argparse.Namespace, tables: Sequence[str]) -> dict[str, Any]:
    """The values of an option by table."""
    values: dict[str, Any] = {}
    for name, value in getattr(arguments, option):
        if name not in tables:
            raise ValueError(
                f"{_flag(option)}: {arguments.checkpoint} has no table {name!r}; tables: "
                f"{', '.join(tables) or 'none'}."
            )
        if name in values:
            raise ValueError(f"{_flag(option)}: table {name!r} is named twice.")
        values[name] = value
    return values


def _by_table(kind: Callable[[str], Any], text: str) -> tuple[str, Any]:
    name, is_there, value = text.rpartition("=")
    if not (name and is_there and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TABLE=VALUE")
    return name, kind(value)


def _table_name(text: str) -> str:
    if not re.fullmatch(r"[^.\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be a table's name: it has a dot or space"
        )
    return text


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?i?B)", text)
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, as 20GB or 20GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
