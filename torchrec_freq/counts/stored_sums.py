"""Row-wise Adagrad's sums in a checkpoint of ``torch.distributed.checkpoint``, table by table."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchrec_freq.counts.adagrad import check_sums
from torchrec_freq.counts.state import table_names
from torchrec_freq.counts.stored import load_part, natural, read_metadata, saved_parts

_MOMENTUM: Final = ".momentum1"
_TABLE: Final = re.compile(r".*\.embedding(?:_bag)?s\.([^.]+)\.weight", re.DOTALL)


@dataclass(frozen=True)
class _Part:
    """Some rows of some columns of a table.

    Attributes:
        offset: in the stored tensor.
        row: first row.
        rows: how many.
        share: of the table's columns that these are.
    """

    offset: int
    row: int
    rows: int
    share: float


@dataclass(frozen=True)
class StoredSums:
    """A table whose sums are stored.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        rows: number of rows.
    """

    name: str
    rows: int
    _folder: Path
    _key: str
    _parts: list[_Part]

    def read(self) -> Tensor:
        r"""The sums of the whole table, for :func:`torchrec_freq.load_adagrad_sums`.

        A column shard's sum is of the mean square over its own columns. The mean over the shards,
        weighted by their numbers of columns, is the sum of the mean square over all columns: what
        a table that is not split has.

        Memory holds the sums, and twice a shard as a rank saved it.

        Returns:
            float32 [rows].

        Raises:
            ValueError: sums that cannot be read, are negative or not finite; the message names
                folder and table.
            OSError: a file cannot be read.
        """
        sums_R = torch.zeros(self.rows)
        size = sum(part.rows for part in self._parts)
        for part in self._parts:
            part_R = torch.empty(part.rows)
            load_part(self._folder, self._key, size, part.offset, part_R)
            sums_R[part.row : part.row + part.rows].add_(part_R, alpha=part.share)
        try:
            check_sums(self.name, sums_R)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}") from error
        return sums_R


def open_sums(folder: Path) -> list[StoredSums]:
    """The tables of a checkpoint that were trained with TorchRec's row-wise Adagrad.

    Only what describes them is read. It needs no process group, and fits any sharding plan.

    Args:
        folder: a checkpoint of the model's state and of its fused optimizer's.

    Raises:
        ValueError: not a checkpoint, damaged, or without such sums; the message says what is
            missing, of which table.
        OSError: it cannot be read.
    """
    metadata = read_metadata(folder)
    stems = [
        key.removesuffix(_MOMENTUM)
        for key in metadata.state_dict_metadata
        if key.endswith(_MOMENTUM)
    ]
    if not stems:
        raise ValueError(
            f"{folder} is a checkpoint without row-wise Adagrad's sums: it has no key that ends in "
            f"{_MOMENTUM!r}. Save the optimizer's state too: "
            '{"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}.'
        )
    found = []
    for stem, name in zip(stems, table_names(stems), strict=True):
        weight = _weight(folder, stem, name, metadata)
        parts = _parts(folder, stem + _MOMENTUM, name, weight, metadata)
        found.append(StoredSums(name, weight.size[0], folder, stem + _MOMENTUM, parts))
    return sorted(found, key=lambda table: natural(table.name))


def tables_without_sums(folder: Path) -> list[str]:
    """Tables whose weights are stored, but no sums: trained with another optimizer, or not at all.

    Raises:
        ValueError, OSError: as of :func:`open_sums`.
    """
    keys = read_metadata(folder).state_dict_metadata
    weights = {match[1] for key in keys if (match := _TABLE.fullmatch(key))}
    trained = {
        key.removesuffix(_MOMENTUM).rpartition(".weight.")[2]
        for key in keys
        if key.endswith(_MOMENTUM)
    }
    return sorted(weights - trained, key=natural)


def _weight(folder: Path, stem: str, name: str, metadata: Metadata) -> TensorStorageMetadata:
    """What describes a table's weights: only they tell rows from columns behind each other."""
    key = stem.rpartition(".weight.")[0] + ".weight"

    def common(other: str) -> int:
        """Parts of the path that two keys have in common, from the end."""
        pairs = zip(reversed(key.split(".")), reversed(other.split(".")), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    # With the collection's and the table's name.
    found = [other for other in metadata.state_dict_metadata if common(other) >= 3]
    best = max(found, key=common, default=None)
    weight = metadata.state_dict_metadata[best] if best else None
    if not isinstance(weight, TensorStorageMetadata) or len(weight.size) != 2:
        raise ValueError(
            f"{folder} has the sums of table {name!r} but not its weights, which say how its "
            "columns were sharded. Save both: "
            '{"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}.'
        )
    return weight


def _parts(
    folder: Path, key: str, name: str, weight: TensorStorageMetadata, metadata: Metadata
) -> list[_Part]:
    """The stored parts, in order: TorchRec lays the sums of column shards behind each other."""
    stored: Any = metadata.state_dict_metadata[key]
    if (
        not isinstance(stored, TensorStorageMetadata)
        or len(stored.size) != 1
        or not stored.properties.dtype.is_floating_point
    ):
        raise ValueError(
            f"{folder}: {key} of table {name!r} is not a row-wise Adagrad's, which has one number "
            f"a row: {getattr(stored, 'size', stored)}. Other optimizers' cannot be converted."
        )
    rows, columns = weight.size
    widths = sorted({(c.offsets[1], c.sizes[1]) for c in weight.chunks if c.sizes[1]})
    if rows * len(widths) != stored.size[0] or sum(width for _, width in widths) != columns:
        raise ValueError(
            f"{folder}: {key} has {stored.size[0]} sums, but table {name!r} has {rows} rows in "
            f"{len(widths)} column shards. Weights and sums are not of one run."
        )
    return [
        _Part(offset, offset % rows, size, widths[offset // rows][1] / columns)
        for offset, size in saved_parts(folder, key, metadata)
    ]
