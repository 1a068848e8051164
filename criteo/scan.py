"""Looks for bad samples in all files before training, the ranks sharing the work."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES
from tqdm import tqdm

from criteo.data import KINDS, Days, Samples
from criteo.ranks import from_first, gather, together
from torchrec_freq.output import write_text

MOST_BAD: Final = 10_000_000  # rows of a rank's part; more are no accident
CHUNK: Final = 1 << 18  # samples read at once: some 45 MB


@dataclass(frozen=True)
class Fault:
    """Bad rows of a file.

    Attributes:
        first, last: row numbers, counted from 0.
        rows: how many are bad.
        what: is wrong in the first one.
    """

    file: str
    first: int
    last: int
    rows: int
    what: str

    def __str__(self) -> str:
        where = f"row {self.first}" if self.rows == 1 else f"rows {self.first} to {self.last}"
        more = f", {self.rows} bad ones" if self.rows > 1 else ""
        return f"{self.file}, {where}{more}: {self.what}"

    def __add__(self, later: "Fault") -> "Fault":
        return replace(self, last=later.last, rows=self.rows + later.rows)


@dataclass(frozen=True)
class Scan:
    """What was found, the same on every rank.

    Attributes:
        largest: id of each table in the good samples; -1 without any.
        bad: numbers of the bad samples, ascending, counted over all days.
        faults: of the files.
    """

    largest: list[int]
    bad: list[int]
    faults: list[Fault]

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
    total, rank, ranks = int(days.starts[-1]), dist.get_rank(), dist.get_world_size()
    start, stop = total * rank // ranks, total * (rank + 1) // ranks
    largest = np.full(CAT_FEATURE_COUNT, -1, np.int64)
    bad: list[int] = []
    faults: dict[str, Fault] = {}
    with (
        together(),
        tqdm(
            desc="check", total=stop - start, unit=" rows", unit_scale=True, disable=rank != 0
        ) as bar,
    ):
        for low in range(start, stop, CHUNK):
            first = low
            for day, begin, end in days.pieces(low, min(low + CHUNK, stop)):
                samples = day.read(begin, end)
                wrong = {kind: _wrong(kind, samples[kind], rows) for kind in KINDS}
                is_bad = np.zeros(end - begin, bool)
                for kind, cells in wrong.items():
                    if (bad_rows := np.flatnonzero(cells.any(axis=1))).size:
                        name = day.files[kind].name
                        fault = Fault(
                            name,
                            begin + int(bad_rows[0]),
                            begin + int(bad_rows[-1]),
                            len(bad_rows),
                            _what(kind, samples, cells, int(bad_rows[0]), rows),
                        )
                        faults[name] = faults[name] + fault if name in faults else fault
                        is_bad[bad_rows] = True
                if len(bad) > MOST_BAD:
                    raise ValueError(
                        f"More than {MOST_BAD:,} bad rows: {next(iter(faults.values()))}. Are "
                        "data.rows those of the tables, in the order of the columns?"
                    )
                bad += (first + np.flatnonzero(is_bad)).tolist()
                if not is_bad.all():
                    largest = np.maximum(largest, samples["sparse"][~is_bad].max(axis=0))
                first += end - begin
                bar.update(end - begin)
    merged: dict[str, Fault] = {}
    all_bad: list[int] = []
    for others_largest, others_bad, others_faults in gather((largest, bad, faults)):
        largest = np.maximum(largest, others_largest)
        all_bad += others_bad
        for name, fault in others_faults.items():
            merged[name] = merged[name] + fault if name in merged else fault
    result = Scan(largest.tolist(), all_bad, list(merged.values()))
    with together():
        if rank == 0:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps({"key": key, **asdict(result)}))
    return result


def _key(days: Days, rows: Sequence[int] | None) -> list[Any]:
    """What the result depends on, as JSON has it."""
    files = [path for day in days.days for path in day.files.values()]
    stats = [(str(path.resolve()), path.stat()) for path in files]
    seen = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return [seen, None if rows is None else list(rows)]


def _load(cache: Path, key: list[Any]) -> Scan | None:
    """What is kept of these files; None where there is nothing, or something else."""
    try:
        known = json.loads(cache.read_text())
        if known.pop("key") == key:
            return Scan(**known | {"faults": [Fault(**fault) for fault in known["faults"]]})
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        pass
    return None


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


def _what(
    kind: str, samples: Samples, wrong: NDArray[np.bool_], row: int, rows: Sequence[int] | None
) -> str:
    column = int(np.flatnonzero(wrong[row])[0])
    value = samples[kind][row, column]
    if kind == "dense":
        return f"{value} in column {column}"
    if kind == "labels":
        return f"label {value} is neither 0 nor 1"
    if rows is None or value < 0:
        return f"id {value} of {DEFAULT_CAT_NAMES[column]} is negative"
    return f"id {value} of {DEFAULT_CAT_NAMES[column]}, whose table has {rows[column]} rows"
