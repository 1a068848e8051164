"""Checkpoints of ``torch.distributed.checkpoint``, read some rows at a time.

It needs no process group, and fits any sharding plan.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from torchrec_freq.counts.dcp_metadata import read_metadata
from torchrec_freq.counts.state import (
    MOMENTUM,
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    TABLE_TOTALS,
    table_names,
)

_WEIGHT: Final = re.compile(r"(?:.+\.)?embedding(?:_bag)?s\.(?P<table>[^.]+)\.weight", re.DOTALL)
_STATE: Final = re.compile(rf"{_WEIGHT.pattern}\.(?P=table)", re.DOTALL)
_OURS: Final = (MOMENTUM, ROW_COUNTER, TABLE_TOTALS, ROW_COUNTER_AGE)

# Rows that are read at once where all are.
_BLOCK_ROWS: Final = 1 << 20
# Rows whose bytes lie nearer than this are read at once, if they are in the same window.
_GAP_BYTES: Final = 1 << 16
_WINDOW_BYTES: Final = 1 << 23


@dataclass(frozen=True)
class TableKeys:
    """The keys of a table in a checkpoint.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        weight: key of its weights; None where they were not saved.
        states: keys of its optimizer's state, by their last part.
    """

    name: str
    weight: str | None
    states: dict[str, str]


class Checkpoint:
    """A checkpoint that is read.

    Attributes:
        metadata: what describes it.
        stored: what describes each key.

    Raises:
        ValueError: no whole checkpoint, or a damaged one; the message names the folder.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.stored = self.metadata.state_dict_metadata
        self._starts: dict[MetadataIndex, int] = {}

    def tables(self) -> list[TableKeys]:
        """The tables whose weights or optimizer state it holds, in the order of their names."""
        weights = [key for key in self.stored if _WEIGHT.fullmatch(key)]
        states: dict[str, dict[str, str]] = defaultdict(dict)
        for key in self.stored:
            stem, _, state = key.rpartition(".")
            if stem and (state in _OURS or _STATE.fullmatch(stem)):
                states[stem][state] = key
        found = [(stem, _nearest(stem, weights), states[stem]) for stem in states]
        known = {weight for _, weight, _ in found}
        # A table without state is named as one with.
        found += [(f"{w}.{w.split('.')[-2]}", w, {}) for w in weights if w not in known]
        names = table_names([stem for stem, _, _ in found])
        tables = [TableKeys(n, w, s) for n, (_, w, s) in zip(names, found, strict=True)]
        return sorted(tables, key=lambda table: natural(table.name))

    def size(self, key: str, dimensions: int, *dtypes: torch.dtype) -> torch.Size:
        """Size of a tensor that is there as a whole, also in the files.

        Args:
            dtypes: that it may have; any where none is given.

        Raises:
            ValueError: it is another thing, or not whole; the message names folder and key.
        """
        stored = self.stored[key]
        if (
            not isinstance(stored, TensorStorageMetadata)
            or len(stored.size) != dimensions
            or (dtypes and stored.properties.dtype not in dtypes)
        ):
            raise ValueError(
                f"{self.folder}: {key} is no tensor of {dimensions} dimensions and type "
                f"{' or '.join(map(str, dtypes)) or 'any'}: {stored}."
            )
        self.check(key)
        return stored.size

    def check(self, key: str) -> None:
        """Refuses what is not whole, here or in the files.

        Raises:
            ValueError: the message names folder or file, and key.
        """
        parts, itemsize = self._parts(key), 1
        if isinstance(stored := self.stored[key], TensorStorageMetadata):
            itemsize = stored.properties.dtype.itemsize
            if sum(parts.values()) != math.prod(stored.size):
                raise ValueError(
                    f"{self.folder}: {key} is not whole: its parts have {sum(parts.values())} of "
                    f"{math.prod(stored.size)} numbers."
                )
        for index, numbers in parts.items():
            self._place(index, numbers * itemsize)

    def bytes_of(self, key: str) -> int:
        """Bytes of its parts in the files."""
        return sum(self._place(index).length for index in self._parts(key))

    def widths(self, key: str) -> tuple[int, ...]:
        """Columns of each column shard of a table's weights; empty where they are not split."""
        chunks = getattr(self.stored[key], "chunks", ())
        shards = sorted({(c.offsets[1], c.sizes[1]) for c in chunks if c.sizes[1:] > (0,)})
        return tuple(width for _, width in shards) if len(shards) > 1 else ()

    def read(self, key: str, rows: Tensor | None = None) -> Tensor:
        """Reads a tensor, or some of its rows, in the order asked for.

        Args:
            rows: int64 [n]; None for all.

        Returns:
            [n, ...]. Memory holds little more.

        Raises:
            ValueError: damaged; the message names folder and key.
        """
        stored = self.stored[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{self.folder}: {key} is no tensor, so it is not read.")
        if rows is None:
            whole = torch.empty(stored.size, dtype=stored.properties.dtype)
            for first in range(0, len(whole), _BLOCK_ROWS):
                block = whole[first : first + _BLOCK_ROWS]
                block.copy_(self.read(key, torch.arange(first, first + len(block))))
            return whole
        found = torch.empty(len(rows), *stored.size[1:], dtype=stored.properties.dtype)
        order = None
        if not bool((rows.diff() > 0).all()):
            rows, order = rows.sort()
        filled = 0
        for chunk in stored.chunks:
            first, size = chunk.offsets[0], chunk.sizes[0]
            ends = torch.tensor([first, first + size])
            begin, end = torch.searchsorted(rows, ends).tolist()
            if begin == end or not math.prod(chunk.sizes):
                continue
            part = self._rows_of(key, chunk, stored.properties.dtype, rows[begin:end] - first)
            target = found
            for dimension in range(1, found.dim()):
                target = target.narrow(dimension, chunk.offsets[dimension], chunk.sizes[dimension])
            target[slice(begin, end) if order is None else order[begin:end]] = part
            filled += part.numel()
        if filled != found.numel():
            raise ValueError(f"{self.folder}: {key} is not whole: rows are missing.")
        return found

    def _rows_of(
        self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, rows: Tensor
    ) -> Tensor:
        """Some rows of a saved part, ascending."""
        width = math.prod(chunk.sizes[1:]) * dtype.itemsize
        info = self._place(MetadataIndex(key, chunk.offsets), chunk.sizes[0] * width)
        start = self._start(key, chunk, dtype, info)
        cuts = [0, len(rows)]
        if int(rows[-1] - rows[0]) >= len(rows):
            near = (rows.diff() * width < _GAP_BYTES) & (
                (rows * width // _WINDOW_BYTES).diff() == 0
            )
            cuts[1:1] = ((~near).nonzero().flatten() + 1).tolist()
        parts = []
        with (self.folder / info.relative_path).open("rb", buffering=0) as file:
            for begin, end in itertools.pairwise(cuts):
                first, last = int(rows[begin]), int(rows[end - 1])
                block = torch.empty(last + 1 - first, *chunk.sizes[1:], dtype=dtype)
                file.seek(start + first * width)
                target = block.view(torch.uint8).numpy().reshape(-1).data
                while target:
                    if not (count := file.readinto(target)):
                        raise ValueError(f"{self.folder}: {key} cannot be read: a file ends.")
                    target = target[count:]
                is_whole = len(block) == end - begin
                parts.append(block if is_whole else block[rows[begin:end] - first])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _start(
        self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, info: _StorageInfo
    ) -> int:
        """Place of a saved part's numbers in its file, where ``torch.load`` finds them."""
        index = MetadataIndex(key, chunk.offsets)
        if index in self._starts:
            return self._starts[index]
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                view: Any = _create_file_view(file, info.offset, info.length)
                values = torch.load(view, map_location="meta", weights_only=True)
            expected = (chunk.sizes, dtype, True)
            if (values.shape, values.dtype, values.is_contiguous()) != expected:
                raise ValueError(f"it holds {values.dtype} {list(values.shape)}")
            begin = values.untyped_storage()._checkpoint_offset
            begin += values.storage_offset() * dtype.itemsize
            if begin + values.numel() * dtype.itemsize > info.length:
                raise ValueError("it ends too soon")
        except Exception as error:  # bytes that are no tensor can fail in any way
            raise ValueError(
                f"{path}: {key} cannot be read: {error!r}. Copy the file again."
            ) from error
        self._starts[index] = info.offset + int(begin)
        return self._starts[index]

    def raw(self, key: str) -> Iterator[tuple[MetadataIndex, Any]]:
        """The parts of a key, whatever it is, and each one's bytes as a file to read.

        Raises:
            ValueError: one is missing; the message names the file.
        """
        for index in self._parts(key):
            info = self._place(index)
            with (self.folder / info.relative_path).open("rb") as file:
                yield index, _create_file_view(file, info.offset, info.length)

    def _parts(self, key: str) -> dict[MetadataIndex, int]:
        """How many numbers each saved part of a tensor has; 0 of what is none."""
        if isinstance(stored := self.stored[key], TensorStorageMetadata):
            return {MetadataIndex(key, c.offsets): math.prod(c.sizes) for c in stored.chunks}
        return {MetadataIndex(key): 0}

    def _place(self, index: MetadataIndex, size: int = 0) -> _StorageInfo:
        """Where a part is in its file, which has room for ``size`` bytes there."""
        info, key = self.metadata.storage_data.get(index), index.fqn
        if info is None or info.length < size:
            raise ValueError(
                f"{self.folder}/.metadata is damaged: {key} has no place for {size} bytes."
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{self.folder}: {key} was saved by an extension. Save it without.")
        path = self.folder / info.relative_path
        if not path.exists():
            raise ValueError(f"{path} is missing: {key} cannot be read. Copy it again.")
        if path.stat().st_size < info.offset + info.length:
            raise ValueError(f"{path} is truncated: {key} cannot be read. Copy it again.")
        assert isinstance(info, _StorageInfo)
        return info


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)  # every second one is a number
    return [
        (len(number := part.lstrip("0")), number) if index % 2 else (0, part)
        for index, part in enumerate(parts)
    ]


def _nearest(stem: str, weights: Sequence[str]) -> str | None:
    """Of the keys of weights, the one that has most of a state's path, from the end."""
    path = f"{stem.rpartition('.weight.')[0]}.weight".split(".")

    def common(key: str) -> int:
        pairs = zip(reversed(path), reversed(key.split(".")), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    best = max(weights, key=common, default="")
    return best if common(best) >= 3 else None  # with the collection's and the table's name
