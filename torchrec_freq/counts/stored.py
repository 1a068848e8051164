"""Counts where they are stored, block by block: in a file of counts, or in a checkpoint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from torchrec_freq.counts.dcp_metadata import Reader
from torchrec_freq.counts.files import CountsReader
from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.state import (
    COUNT_CEILING,
    ROW_COUNTER,
    STATE_FORMAT,
    TABLE_TOTALS,
    TOTALS,
    check_counts,
    table_names,
)

_BLOCK_ROWS: Final = 1 << 22


@dataclass(frozen=True)
class StoredTable:
    """A table whose counts are stored.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        rows: number of rows.
        totals: float64 [4], see :mod:`torchrec_freq.counts.state`; None where unknown.
        squares: of a file of counts that has them, from which :meth:`counted` makes totals.
        blocks: reads the counts: first row of a block, and its counts.
    """

    name: str
    rows: int
    totals: Tensor | None
    blocks: Callable[[], Iterator[tuple[int, Tensor]]]
    squares: float | None = None

    def counted(self, lookups: float) -> StoredTable:
        """This table, once the sum of its counts is known."""
        if not self.squares or not lookups:
            return self
        totals = torch.tensor([STATE_FORMAT, self.squares, lookups, lookups], dtype=torch.float64)
        return replace(self, totals=totals)


def open_stored(path: Path) -> list[StoredTable]:
    """The tables in a file of counts, or in a checkpoint of ``torch.distributed.checkpoint``.

    Only what describes them is read; memory holds a block of the counts at a time, some 16 MB of a
    file, or twice a shard as a rank saved it of a checkpoint. It needs no process group, and runs
    nothing of what is in the folder.

    Args:
        path: a file of :func:`torchrec_freq.save_counts`, or a folder with ``.metadata``.

    Raises:
        ValueError: truncated, damaged, or without counts; the message names the path.
        OSError: missing, or cannot be read.
    """
    if path.is_dir():
        # In the order of their names, whatever plan saved them: cat_2 before cat_10.
        return sorted(_open_checkpoint(path), key=lambda table: natural(table.name))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    file = CountsReader(path)
    return [
        StoredTable(name, rows, None, partial(_file_blocks, file, name), file.squares.get(name))
        for name, rows in file.rows.items()
    ]


def _file_blocks(file: CountsReader, name: str) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for counts_R in file.blocks(name, _BLOCK_ROWS):
        yield first, counts_R
        first += len(counts_R)


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint says of its tensors.

    Raises:
        ValueError: no whole checkpoint, or a damaged one; the message names the folder.
        OSError: it cannot be read.
    """
    if not (folder / ".metadata").exists():
        whole = [str(path.parent) for path in sorted(folder.rglob(".metadata"))]
        below = f" Whole ones below it: {', '.join(whole)}." if whole else ""
        raise ValueError(
            f"{folder} is not a whole checkpoint of torch.distributed.checkpoint: it has no "
            f".metadata. Name the folder that was given to save as checkpoint_id.{below}"
        )
    return Reader(folder).read_metadata()


def _open_checkpoint(folder: Path) -> list[StoredTable]:
    metadata = read_metadata(folder)
    stored = metadata.state_dict_metadata
    suffix = f".{ROW_COUNTER}"
    stems = [key.removesuffix(suffix) for key in stored if key.endswith(suffix)]
    if not stems:
        raise ValueError(
            f"{folder} is a checkpoint without row counters: it has no key that ends in "
            f"{suffix!r}. Save the optimizer's state too: "
            '{"optimizer": model.fused_optimizer.state_dict()}.'
        )
    tables = []
    for stem, name in zip(stems, table_names(stems), strict=True):
        chunks = _chunks(folder, stem + suffix, metadata)
        totals = torch.zeros(TOTALS, dtype=torch.float64)
        if f"{stem}.{TABLE_TOTALS}" in stored:  # not in a checkpoint of version 0.1
            _load(folder, f"{stem}.{TABLE_TOTALS}", totals)
            if not bool((totals.isfinite() & (totals >= 0)).all()):
                raise ValueError(
                    f"{folder} is damaged: {stem}.{TABLE_TOTALS} is {totals.tolist()}."
                )
        tables.append(
            StoredTable(
                name=name,
                rows=stored[stem + suffix].size[0],  # type: ignore[union-attr]
                totals=totals if totals[0] == STATE_FORMAT and min(totals[2:]) > 0 else None,
                blocks=partial(_checkpoint_blocks, folder, stem + suffix, name, chunks),
            )
        )
    return tables


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)  # every second one is a number
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = numbers
    return [(len(part) if index % 2 else 0, part) for index, part in enumerate(parts)]


def _chunks(folder: Path, key: str, metadata: Metadata) -> list[tuple[int, int]]:
    """First row and number of rows of each saved part, in order."""
    stored = metadata.state_dict_metadata[key]
    if (
        not isinstance(stored, TensorStorageMetadata)
        or len(stored.size) != 1
        or stored.properties.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"{folder}: {key} is no tensor of counts [num_embeddings]: {stored}.")
    return saved_parts(folder, key, metadata)


def saved_parts(folder: Path, key: str, metadata: Metadata) -> list[tuple[int, int]]:
    """First element and length of each saved part of a tensor of one dimension, in order.

    Raises:
        ValueError: parts are missing, also in the files; the message names folder and key.
    """
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    if any(len(chunk.sizes) != 1 for chunk in stored.chunks):
        raise ValueError(f"{folder}/.metadata is damaged: {key} has parts of other dimensions.")
    # Ranks without a row may have saved a part of none.
    chunks = sorted((c.offsets[0], c.sizes[0]) for c in stored.chunks if c.sizes[0])
    end = 0
    for first, rows in chunks:
        if first != end:
            break
        end += rows
    if end != stored.size[0]:
        raise ValueError(f"{folder}: {key} lacks rows from {end} of {stored.size[0]}.")
    # No memory for more rows than files can hold.
    for first, rows in chunks:
        info = metadata.storage_data.get(MetadataIndex(key, [first]))
        if info is None or info.length < rows * stored.properties.dtype.itemsize:
            raise ValueError(f"{folder}/.metadata is damaged: {key} has no place for {rows} rows.")
        file = folder / info.relative_path
        if file.exists() and file.stat().st_size < info.offset + info.length:
            raise ValueError(f"{file} is truncated: {key} cannot be read. Copy it again.")
    return chunks


def _checkpoint_blocks(
    folder: Path, key: str, name: str, chunks: list[tuple[int, int]]
) -> Iterator[tuple[int, Tensor]]:
    for first, rows in chunks:
        counts_R = torch.empty(rows, dtype=torch.int32)
        load_part(folder, key, sum(rows for _, rows in chunks), first, counts_R)
        # A counter may be above the ceiling until it is clamped.
        counts_R.clamp_(max=COUNT_CEILING)
        try:
            check_counts(name, counts_R)
        except ValueError as error:
            raise ValueError(f"{folder}: {error} The checkpoint is damaged.") from error
        yield first, counts_R


def load_part(folder: Path, key: str, size: int, first: int, into: Tensor) -> None:
    """Reads the elements of a tensor of one dimension from ``first`` on, as many as ``into`` has.

    Args:
        size: of the whole tensor.

    Raises:
        ValueError: they cannot be read; the message names folder and key.
    """
    _load(folder, key, RowState(size, [RowShard(first, True, into)]))


def _load(folder: Path, key: str, into: Tensor) -> None:
    """Reads one tensor, or those parts of it that a ``RowState`` has."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({key: into}, storage_reader=Reader(folder), no_dist=True)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from error
        raise ValueError(
            f"{folder}: {key} cannot be read: {'; '.join(map(repr, causes))}. Copy it again."
        ) from error
