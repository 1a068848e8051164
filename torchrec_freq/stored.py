"""Counts where they are stored, block by block: in a file of counts, or in a checkpoint."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_freq.engine.counters import COUNT_CEILING, check_counts
from torchrec_freq.files import count_blocks, counts_layout
from torchrec_freq.sharded.row_state import RowShard, RowState
from torchrec_freq.state import ROW_COUNTER, STATE_FORMAT, TABLE_TOTALS, TOTALS

_BLOCK_ROWS: Final = 1 << 22

# Of a sharded collection: what the user called the optimizer, the collection's path, the table.
_SHARDED: Final = re.compile(
    r"(?:(?:.*\.)?state\.)?(?:(?P<path>.+)\.)?embedding(?:_bag)?s\.(?P<table>.+)\.weight\.(?P=table)"
)


@dataclass(frozen=True)
class StoredTable:
    """A table whose counts are stored.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        rows: number of rows.
        totals: float64 [4], see :mod:`torchrec_freq.state`; None where unknown.
        blocks: reads the counts: first row of a block, and its counts.
    """

    name: str
    rows: int
    totals: Tensor | None
    blocks: Callable[[], Iterator[tuple[int, Tensor]]]


def open_stored(path: Path) -> list[StoredTable]:
    """The tables in a file of counts, or in a checkpoint of ``torch.distributed.checkpoint``.

    Only what describes them is read; memory holds a block of the counts at a time, some 16 MB of a
    file, or twice a shard as a rank saved it of a checkpoint. It needs no process group.

    Args:
        path: a file of :func:`torchrec_freq.save_counts`, or a folder with ``.metadata``.

    Raises:
        ValueError: truncated, damaged, or without counts; the message names the path.
        OSError: missing, or cannot be read.
    """
    if path.is_dir():
        # In the order of their names, whatever plan saved them: cat_2 before cat_10.
        return sorted(_open_checkpoint(path), key=lambda table: _natural(table.name))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    rows, _ = counts_layout(path)
    return [StoredTable(name, rows[name], None, partial(_file_blocks, path, name)) for name in rows]


def _file_blocks(path: Path, name: str) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for counts_R in count_blocks(path, name, _BLOCK_ROWS):
        yield first, counts_R
        first += len(counts_R)


def _open_checkpoint(folder: Path) -> list[StoredTable]:
    if not (folder / ".metadata").exists():
        whole = [str(path.parent) for path in sorted(folder.rglob(".metadata"))]
        below = f" Whole ones below it: {', '.join(whole)}." if whole else ""
        raise ValueError(
            f"{folder} is not a whole checkpoint of torch.distributed.checkpoint: it has no "
            f".metadata. Name the folder that was given to save as checkpoint_id.{below}"
        )
    try:
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"{folder}/.metadata is damaged: {error!r}. Copy it again.") from error
    suffix = f".{ROW_COUNTER}"
    stems = [key.removesuffix(suffix) for key in stored if key.endswith(suffix)]
    if not stems:
        raise ValueError(
            f"{folder} is a checkpoint without row counters: it has no key that ends in "
            f"{suffix!r}. Save the optimizer's state too: "
            '{"optimizer": model.fused_optimizer.state_dict()}.'
        )
    tables = []
    for stem, name in zip(stems, _names(stems), strict=True):
        chunks = _chunks(folder, stem + suffix, stored[stem + suffix])
        totals = torch.zeros(TOTALS, dtype=torch.float64)
        if f"{stem}.{TABLE_TOTALS}" in stored:  # not in a checkpoint of version 0.1
            _load(folder, f"{stem}.{TABLE_TOTALS}", totals)
        tables.append(
            StoredTable(
                name=name,
                rows=stored[stem + suffix].size[0],  # type: ignore[union-attr]
                totals=totals if totals[0] == STATE_FORMAT and totals[3] > 0 else None,
                blocks=partial(_checkpoint_blocks, folder, stem + suffix, name, chunks),
            )
        )
    return tables


def _natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts numbers in names by their value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _names(stems: list[str]) -> list[str]:
    """A table's name, with the path of its collection where two have one of that name."""
    forms = []
    for stem in stems:
        match = _SHARDED.fullmatch(stem)
        table = match["table"] if match else stem
        forms.append(
            (table, f"{match['path']}.{table}" if match and match["path"] else table, stem)
        )
    uses = [Counter(level) for level in zip(*forms, strict=True)]
    return [next(f for f, use in zip(form, uses, strict=True) if use[f] == 1) for form in forms]


def _chunks(folder: Path, key: str, stored: Any) -> list[tuple[int, int]]:
    """First row and number of rows of each saved part, in order."""
    if (
        not isinstance(stored, TensorStorageMetadata)
        or len(stored.size) != 1
        or stored.properties.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"{folder}: {key} is no tensor of counts [num_embeddings]: {stored}.")
    chunks = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in stored.chunks)
    end = 0
    for first, rows in chunks:
        if first != end:
            break
        end += rows
    if end != stored.size[0]:
        raise ValueError(f"{folder}: {key} lacks rows from {end} of {stored.size[0]}.")
    return chunks


def _checkpoint_blocks(
    folder: Path, key: str, name: str, chunks: list[tuple[int, int]]
) -> Iterator[tuple[int, Tensor]]:
    for first, rows in chunks:
        counts_R = torch.empty(rows, dtype=torch.int32)
        total = sum(rows for _, rows in chunks)
        _load(folder, key, RowState(total, [RowShard(first, True, counts_R)]))
        # A counter may be above the ceiling until it is clamped.
        counts_R.clamp_(max=COUNT_CEILING)
        try:
            check_counts(name, counts_R)
        except ValueError as error:
            raise ValueError(f"{folder}: {error} The checkpoint is damaged.") from error
        yield first, counts_R


def _load(folder: Path, key: str, into: Tensor) -> None:
    """Reads one tensor, or those parts of it that a ``RowState`` has."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({key: into}, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        causes = "; ".join(repr(cause) for cause, _ in error.failures.values())
        raise ValueError(f"{folder}: {key} cannot be read: {causes}. Copy it again.") from error
