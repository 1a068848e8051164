"""A checkpoint with other tables: grown, shrunk, renamed, or with their rows in another order.

Reads a checkpoint of torch.distributed.checkpoint, of any sharding plan, and writes a new one. A
row that is kept keeps its weights, its count and its sum of squares, and so its rate. A new row has
TorchRec's initial weights, and 0 in the optimizer's state. The optimizer may be FrequencySGD,
TorchRec's row-wise Adagrad, or another one whose state has a value for each row. Other tables and
all else are copied.

Among the new files is TABLE.mapping.npy for each table that lost rows or reordered them: int64
[old rows], the new row of each old one, -1 where it is lost.

Memory holds about 30 bytes for each row of the largest table, and 200 MB, but not its weights.
"""

from __future__ import annotations

import argparse
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
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from torchrec_freq.cli.arguments import whole_number
from torchrec_freq.cli.resize_tables import StoredRows
from torchrec_freq.cli.terminal import progress, visible
from torchrec_freq.counts.data_files import map_npy
from torchrec_freq.counts.dcp_files import Checkpoint, TableKeys
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
    merge_help = (
        "write a single sum of squares a row where columns were split, for plans that do not split "
        "them (default: one for each column shard, for plans with as many)"
    )
    add("--budget", type=_bytes, metavar="SIZE", help=budget_help)
    add("--admit", type=whole_number, default=1, metavar="N", help=admit_help)
    add("--counts", type=Path, metavar="FILE", help=counts_help)
    add("--merge-columns", action="store_true", help=merge_help)


def run(arguments: argparse.Namespace) -> None:
    """Writes the checkpoint that the command line asks for."""
    output: Path = arguments.output
    check_new(output)
    checkpoint = Checkpoint(arguments.checkpoint)
    for key in checkpoint.stored:
        checkpoint.check(key)
    changes = _changes(checkpoint, arguments)
    renamed = {k: c.stored.new_key(k, c.new_name) for c in changes for k in c.stored.keys}
    copied = [key for key in checkpoint.stored if key not in renamed]
    _check_names(checkpoint, renamed, copied)
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
            old_rows, merge = change.choose(), arguments.merge_columns
            change.stored.write(writer, change.new_name, change.rows, old_rows, merge, bar.update)
            if old_rows is not None or change.rows < change.stored.rows:
                file = folder / f"{quote(change.new_name, safe='')}.mapping.npy"
                np.save(file, change.mapping(old_rows).numpy())
        writer.finish(_paths(checkpoint.metadata.planner_data, renamed))
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


class _Counts:
    """Counts to choose rows by: those of a file, where one is given, or else the checkpoint's."""

    def __init__(self, checkpoint: Checkpoint, file: Path | None) -> None:
        self._checkpoint, self._path = checkpoint, file or checkpoint.folder
        self._keys = {keys.name: keys.states.get(ROW_COUNTER) for keys in checkpoint.tables()}
        self._stored = None if file is None else {t.name: t for t in open_stored(file)}
        self._last: tuple[str, Tensor | None] = ("", None)

    def find(self, name: str, rows: int) -> Tensor | None:
        """int32 [rows] of a table; None where there are none. Those of one table are kept."""
        if self._last[0] != name:
            self._last = ("", None)
            self._last = (name, self._read(name))
        counts_R = self._last[1]
        if counts_R is not None and len(counts_R) != rows:
            raise ValueError(
                f"{self._path} has counts of {len(counts_R)} rows of table {name!r}, which has "
                f"{rows}."
            )
        return counts_R

    def of(self, name: str, rows: int) -> dict[str, Tensor]:
        """The counts of a table, by its name, where there must be some."""
        counts_R = self.find(name, rows)
        if counts_R is None:
            raise ValueError(
                f"{self._path} has no counts of table {name!r}, to choose its rows by. Name a file "
                "of counts, as `python -m torchrec_freq count` writes it: --counts."
            )
        return {name: counts_R}

    def _read(self, name: str) -> Tensor | None:
        if self._stored is None:
            if (key := self._keys[name]) is None:
                return None
            # A counter may be above the ceiling until it is clamped.
            return self._checkpoint.read(key).clamp_(max=COUNT_CEILING)
        if name not in self._stored:
            return None
        blocks = [counts_R for _, counts_R, _ in self._stored[name].blocks()]
        return torch.cat([block_R for block_R in blocks if block_R is not None])


def _changes(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[Change]:
    """What the command line asks for, checked."""
    tables = {keys.name: keys for keys in checkpoint.tables()}
    options = {option: _by_name(option, arguments, tables) for option in _OPTIONS}
    counts = _Counts(checkpoint, arguments.counts)
    if arguments.budget is not None:
        if used := [option for option in (*_CHOOSING, "rows") if options[option]]:
            raise ValueError(
                f"--budget chooses the rows of all tables: leave out {_flag(used[0])}."
            )
        stored = {name: StoredRows(checkpoint, keys) for name, keys in tables.items()}
        histograms = {n: histogram(counts.of(n, t.rows)[n]) for n, t in stored.items()}
        sizes = {name: table.row_bytes for name, table in stored.items()}
        options["keep"] = budget_rows(histograms, sizes, arguments.budget, arguments.admit)
    changes = []
    for name, keys in tables.items():
        mine = {option: values[name] for option, values in options.items() if name in values}
        if mine or (arguments.merge_columns and keys.weight):
            table = StoredRows(checkpoint, keys)
            if mine or table.is_split:
                changes.append(_change(name, table, counts, mine))
    if not changes:
        raise ValueError("Nothing to change: give --rows, --keep, --budget, --rename or the like.")
    return changes


def _change(name: str, table: StoredRows, counts: _Counts, options: Mapping[str, Any]) -> Change:
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
    if (counts_R := counts.find(name, table.rows)) is not None:
        total = int(counts_R.sum())
        coverage = int(counts_R[kept].sum()) / total if total else 1.0
    new_name = options.get("rename", table.table)
    return Change(name, new_name, table, rows, choose, len(kept), coverage)


def _choose(name: str, rows: int, counts: _Counts, options: Mapping[str, Any]) -> Tensor | None:
    """int64: the old row of each new one, -1 for a new id; None for the first rows."""
    if "keep" in options:
        return keep_rows(counts.of(name, rows), {name: options["keep"]})[name].rows
    if "least_count" in options:
        return keep_counted(counts.of(name, rows), {name: options["least_count"]})[name].rows
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


def _check_names(checkpoint: Checkpoint, renamed: Mapping[str, str], copied: Sequence[str]) -> None:
    """Refuses two tables of one name, and a name in a part that is copied unread."""
    taken = set(copied)
    for new in renamed.values():
        if new in taken:
            raise ValueError(
                f"--rename: {checkpoint.folder} already has {new}; choose another name."
            )
        taken.add(new)
    old = [key.rpartition(".")[0] for key, new in renamed.items() if key != new]
    for key in copied if old else ():
        if isinstance(checkpoint.stored[key], BytesStorageMetadata):
            text = b"".join(part.read() for _, part in checkpoint.raw(key))
            if any(stem.split(".")[-1].encode() + b".weight" in text for stem in old):
                raise ValueError(
                    f"--rename: {checkpoint.folder}: {key} has the table's old name in it. Save "
                    "the optimizer without its param_groups."
                )


def _paths(paths: Any, renamed: Mapping[str, str]) -> Any:
    """Where each flat key is in the state that was saved, by the new keys: DCP's planner data."""
    if not isinstance(paths, dict):
        return paths
    found = {}
    for key, path in paths.items():
        parts = iter(renamed.get(key, key).split("."))
        # A new name has as many dots as the old one: none.
        new = tuple(".".join(itertools.islice(parts, str(p).count(".") + 1)) for p in path)
        same = renamed.get(key, key) == key
        found[renamed.get(key, key)] = path if same else new
    return found


def _report(changes: Sequence[Change]) -> Iterator[str]:
    """A table of what is kept and lost."""
    form = "{:<24} {:>13} {:>13} {:>13} {:>13} {:>13} {:>16}"
    yield form.format("table", "rows", "kept", "lost", "new", "lookups kept", "bytes")
    for change in changes:
        old, renamed = change.stored.rows, change.new_name != change.stored.table
        yield form.format(
            f"{change.name} -> {change.new_name}" if renamed else change.name,
            f"{change.rows:,}",
            f"{change.kept:,}",
            f"{old - change.kept:,}",
            f"{change.rows - change.kept:,}",
            "unknown" if change.coverage is None else f"{change.coverage:.2%}",
            f"{change.rows * change.stored.row_bytes:,}",
        )


def _by_name(
    option: str, arguments: argparse.Namespace, tables: Mapping[str, TableKeys]
) -> dict[str, Any]:
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
