"""Looks for bad samples in all files before training, the ranks sharing the work."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES
from tqdm import tqdm

from benchmarks.common.days import KINDS, Days
from benchmarks.common.ranks import from_first, gather
from examples.criteo.refusal import together
from torchrec_freq.output import write_text

MOST_BAD: Final = 10_000_000  # rows of a rank's part; more are no accident
CHUNK: Final = 1 << 18  # samples read at once: some 45 MB

Faults = dict[str, list[tuple[NDArray[np.int64], str]]]
"""By name of a file: bad rows, counted from 0, and what is wrong in the first of them."""


@dataclass(frozen=True)
class Scan:
    """What was found, the same on every rank.

    Attributes:
        largest: id of each table in the good samples; -1 without any.
        bad: numbers of the bad samples, ascending, counted over all days.
        faults: a line a file.
    """

    largest: list[int]
    bad: list[int]
    faults: list[str]

    def message(self, most: int = 10) -> str:
        """The faults, one a line."""
        lines = [f"{len(self.bad):,} bad rows in the data (rows are counted from 0):"]
        lines += [f"  {fault}" for fault in self.faults[:most]]
        if len(self.faults) > most:
            lines.append(f"  and {len(self.faults) - most} more files")
        return "\n".join(lines)


def scan(days: Days, rows: Sequence[int] | None, cache: Path) -> Scan:
    """Checks every sample, unless the same files were checked before.

    Args:
        rows: ids must be below, a number a table; None: any id that is not negative will do.
        cache: file that keeps the result.

    Raises:
        Refused: a file cannot be read, or the result not be kept.
    """
    key = _key(days, rows)
    known: Scan | None = from_first(_load(cache, key) if dist.get_rank() == 0 else None)
    if known is not None:
        return known
    with together():
        found = _scan_part(days, rows)
    largest, bad, faults = found[0], [], Faults()
    for others_largest, others_bad, others_faults in gather(found):
        largest = np.maximum(largest, others_largest)
        bad += others_bad
        for name, parts in others_faults.items():
            faults.setdefault(name, []).extend(parts)
    lines = [_line(name, parts) for name, parts in faults.items()]
    result = Scan(largest.tolist(), bad, lines)
    with together():
        if dist.get_rank() == 0:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps({"key": key, **asdict(result)}))
    return result


def _scan_part(
    days: Days, rows: Sequence[int] | None
) -> tuple[NDArray[np.int64], list[int], Faults]:
    """Largest ids, numbers of bad samples, and faults of this rank's part of the samples."""
    total, rank, ranks = int(days.starts[-1]), dist.get_rank(), dist.get_world_size()
    start, stop = total * rank // ranks, total * (rank + 1) // ranks
    largest = np.full(CAT_FEATURE_COUNT, -1, np.int64)
    bad: list[int] = []
    faults = Faults()
    options = {"unit": " rows", "unit_scale": True, "disable": rank != 0}
    with tqdm(desc="check", total=stop - start, **options) as bar:
        for low in range(start, stop, CHUNK):
            first = low
            for day, begin, end in days.pieces(low, min(low + CHUNK, stop)):
                samples = day.read(begin, end)
                good = np.ones(end - begin, bool)
                for kind in KINDS:
                    wrong = _wrong(kind, samples[kind], rows)
                    bad_rows = np.flatnonzero(wrong.any(axis=1))
                    if len(bad_rows):
                        column = int(wrong[bad_rows[0]].argmax())
                        what = _what(kind, samples[kind][bad_rows[0], column], column, rows)
                        fault = begin + bad_rows, what
                        faults.setdefault(day.files[kind].path.name, []).append(fault)
                        good[bad_rows] = False
                if len(bad) > MOST_BAD:
                    raise ValueError(
                        f"More than {MOST_BAD:,} bad rows: {_line(*next(iter(faults.items())))}. "
                        "Are data.rows those of the tables, in the order of the columns?"
                    )
                bad += (first + np.flatnonzero(~good)).tolist()
                if good.any():
                    largest = np.maximum(largest, samples["sparse"][good].max(axis=0))
                first += end - begin
                bar.update(end - begin)
    return largest, bad, faults


def _key(days: Days, rows: Sequence[int] | None) -> list[Any]:
    """What the result depends on, as JSON has it."""
    files = [file.path for day in days.days for file in day.files.values()]
    stats = [(str(path.resolve()), path.stat()) for path in files]
    seen = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return [seen, None if rows is None else list(rows)]


def _load(cache: Path, key: list[Any]) -> Scan | None:
    """What is kept of these files; None where there is nothing, or something else."""
    try:
        known = json.loads(cache.read_text())
        return Scan(**known) if known.pop("key") == key else None
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None


def _line(file: str, parts: list[tuple[NDArray[np.int64], str]]) -> str:
    rows, what = np.concatenate([rows for rows, _ in parts]), parts[0][1]
    if len(rows) == 1:
        return f"{file}, row {rows[0]}: {what}"
    return f"{file}, rows {rows[0]} to {rows[-1]}, {len(rows)} bad ones: {what}"


def _wrong(kind: str, values: NDArray[Any], rows: Sequence[int] | None) -> NDArray[np.bool_]:
    """Which values of a file are wrong."""
    wrong: NDArray[np.bool_]
    if kind == "dense":
        wrong = ~np.isfinite(values)
    elif kind == "labels":
        wrong = (values != 0) & (values != 1)
    else:
        wrong = values < 0
        if rows is not None:
            wrong |= values >= np.array(rows)
    return wrong


def _what(kind: str, value: Any, column: int, rows: Sequence[int] | None) -> str:
    if kind == "dense":
        return f"{value} in column {column}"
    if kind == "labels":
        return f"label {value} is neither 0 nor 1"
    if rows is None or value < 0:
        return f"id {value} of {DEFAULT_CAT_NAMES[column]} is negative"
    return f"id {value} of {DEFAULT_CAT_NAMES[column]}, whose table has {rows[column]} rows"
