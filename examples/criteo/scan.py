"""Looks for bad samples in all files before training, the ranks sharing the work."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES
from tqdm import tqdm

from benchmarks.common.ranks import from_first, gather
from examples.criteo.days import KINDS, Days
from examples.criteo.refusal import together
from torchrec_freq.output import write_text

CHUNK: Final = 1 << 18  # samples read at once: some 45 MB
SHOWN: Final = 10  # files with bad rows


def scan(days: Days, rows: Sequence[int] | None, cache: Path) -> list[int]:
    """The largest id of each table, once every sample was checked, now or in an earlier run.

    Args:
        rows: ids must be below, a number a table; None: any id that is not negative will do.
        cache: file that keeps the result.

    Raises:
        Refused: bad samples, a file cannot be read, or the result not be kept; on all ranks.
    """
    files = [path for day in days.days for path in map(day.path, KINDS)]
    stats = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = [stats, None if rows is None else list(rows)]
    known: list[int] | None = from_first(_load(cache, key) if dist.get_rank() == 0 else None)
    if known is not None:
        return known
    with together():
        found = _scan_part(days, rows)
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for _, bad, faults in (parts := gather(found)):
        counts += bad
        for name, fault in faults.items():
            first.setdefault(name, fault)
    largest: list[int] = np.max([part[0] for part in parts], axis=0).tolist()
    with together():
        if counts:
            lines = [f"{name}, {first[name]}; {counts[name]} bad rows in it" for name in first]
            more = f"\n  and {len(lines) - SHOWN} more files" if len(lines) > SHOWN else ""
            raise ValueError(
                "Bad rows in the data, counted from 0. Repair the files, or name others:\n  "
                + "\n  ".join(lines[:SHOWN])
                + more
            )
        if dist.get_rank() == 0:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps({"key": key, "largest": largest}))
    return largest


def _load(cache: Path, key: list[Any]) -> list[int] | None:
    """What is kept of these files; None where there is nothing, or something else."""
    try:
        known = json.loads(cache.read_text())
        return list(known["largest"]) if known["key"] == key else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _scan_part(
    days: Days, rows: Sequence[int] | None
) -> tuple[NDArray[np.int64], Counter[str], dict[str, str]]:
    """Of this rank's part: largest ids; by file how many rows are bad, and what the first has."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start, stop = len(days) * rank // ranks, len(days) * (rank + 1) // ranks
    largest = np.full(CAT_FEATURE_COUNT, -1, np.int64)
    bad: Counter[str] = Counter()
    first: dict[str, str] = {}
    options = {"unit": " rows", "unit_scale": True, "disable": rank != 0}
    with tqdm(desc="check", total=stop - start, **options) as bar:
        for low in range(start, stop, CHUNK):
            for day, part in days.pieces(low, min(low + CHUNK, stop)):
                for kind in KINDS:
                    values = day.files[kind][part]
                    wrong = _wrong(kind, values, rows)
                    if len(bad_rows := np.flatnonzero(wrong.any(axis=1))):
                        name, row = day.path(kind).name, bad_rows[0]
                        column = int(wrong[row].argmax())
                        what = _what(kind, values[row, column], column, rows)
                        first.setdefault(name, f"row {part.start + row}: {what}")
                        bad[name] += len(bad_rows)
                    if kind == "sparse":
                        largest = np.maximum(largest, values.max(axis=0))
                bar.update(part.stop - part.start)
    return largest, bad, first


def _wrong(kind: str, values: NDArray[Any], rows: Sequence[int] | None) -> NDArray[np.bool_]:
    """Which values of a file are wrong."""
    if kind == "dense":
        return np.asarray(~np.isfinite(values))
    if kind == "labels":
        return np.asarray((values != 0) & (values != 1))
    bounds = np.array(np.inf if rows is None else rows)
    return np.asarray((values < 0) | (values >= bounds))


def _what(kind: str, value: Any, column: int, rows: Sequence[int] | None) -> str:
    if kind == "dense":
        return f"{value} in column {column}"
    if kind == "labels":
        return f"label {value} is neither 0 nor 1"
    if rows is None or value < 0:
        return f"id {value} of {DEFAULT_CAT_NAMES[column]} is negative"
    return f"id {value} of {DEFAULT_CAT_NAMES[column]}, whose table has {rows[column]} rows"
