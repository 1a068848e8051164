"""Row-wise Adagrad's sums in a checkpoint of ``torch.distributed.checkpoint``, table by table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_freq.counts.adagrad import check_sums
from torchrec_freq.counts.dcp_metadata import Checkpoint
from torchrec_freq.counts.state import table_names
from torchrec_freq.counts.stored import natural

_MOMENTUM: Final = ".momentum1"
_TABLE: Final = re.compile(r".*\.embedding(?:_bag)?s\.([^.]+)\.weight", re.DOTALL)
_FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SAVE_BOTH: Final = (
    'Save both: {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}.'
)


@dataclass(frozen=True)
class StoredSums:
    """A table whose sums are stored.

    Attributes:
        name: as :func:`torchrec_freq.row_counts` gives it.
        rows: number of rows.
        read: reads the sums of the whole table, float32 [rows], for
            :func:`torchrec_freq.load_adagrad_sums`. Memory holds them, and twice a shard as a rank
            saved it. A ValueError names what cannot be read, is negative or not finite.
    """

    name: str
    rows: int
    read: Callable[[], Tensor]


def open_sums(folder: Path) -> list[StoredSums]:
    """The tables of a checkpoint that were trained with TorchRec's row-wise Adagrad.

    Only what describes them is read.

    Args:
        folder: a checkpoint of the model's state and of its fused optimizer's, of any plan.

    Raises:
        ValueError: not a checkpoint, damaged, or without such sums; the message says what is
            missing, of which table.
        OSError: it cannot be read.
    """
    checkpoint = Checkpoint(folder)
    stems = checkpoint.stems(_MOMENTUM)
    if not stems:
        raise ValueError(
            f"{folder} is a checkpoint without row-wise Adagrad's sums: it has no key that ends in "
            f"{_MOMENTUM!r}. {_SAVE_BOTH}"
        )
    tables = map(partial(_stored, checkpoint), stems, table_names(stems))
    return sorted(tables, key=lambda table: natural(table.name))


def tables_without_sums(folder: Path) -> list[str]:
    """Tables whose weights are stored, but no sums: trained with another optimizer, or not at all.

    Raises:
        ValueError, OSError: as of :func:`open_sums`.
    """
    checkpoint = Checkpoint(folder)
    weights = {match[1] for key in checkpoint.stored if (match := _TABLE.fullmatch(key))}
    trained = {stem.rpartition(".weight.")[2] for stem in checkpoint.stems(_MOMENTUM)}
    return sorted(weights - trained, key=natural)


def _stored(checkpoint: Checkpoint, stem: str, name: str) -> StoredSums:
    key = stem + _MOMENTUM
    parts = checkpoint.parts(
        key,
        _FLOATS,
        f"of table {name!r} is not a row-wise Adagrad's, which has one number a row; other "
        "optimizers' cannot be converted",
    )
    # TorchRec lays the sums of column shards behind each other: the weights say how many there are.
    weight = _weight(checkpoint, stem)
    if weight is None:
        raise ValueError(
            f"{checkpoint.folder} has the sums of table {name!r} but not its weights, which say "
            f"how its columns were sharded. {_SAVE_BOTH}"
        )
    rows, columns = weight.size
    shards = sorted({(c.offsets[1], c.sizes[1]) for c in weight.chunks if c.sizes[1]})
    widths, size = [width for _, width in shards], sum(length for _, length in parts)
    if rows * len(widths) != size or sum(widths) != columns:
        raise ValueError(
            f"{checkpoint.folder}: {key} has {size} sums, but table {name!r} has {rows} rows in "
            f"{len(widths)} column shards. Weights and sums are not of one run."
        )

    def read() -> Tensor:
        # The mean of the shards' sums, weighted by their numbers of columns, is the sum of the mean
        # square over all columns: what a table that is not split has.
        sums_R = torch.zeros(rows)
        for first, length in parts:
            part_R = torch.empty(length)
            checkpoint.load(key, part_R, first, size)
            share = widths[first // rows] / columns
            sums_R[first % rows :][:length].add_(part_R, alpha=share)
        try:
            check_sums(name, sums_R)
        except ValueError as error:
            raise ValueError(f"{checkpoint.folder}: {error}") from error
        return sums_R

    return StoredSums(name, rows, read)


def _weight(checkpoint: Checkpoint, stem: str) -> TensorStorageMetadata | None:
    """What describes the weights of a table: the key with most of the path, from the end."""
    path = f"{stem.rpartition('.weight.')[0]}.weight".split(".")

    def common(key: str) -> int:
        pairs = zip(reversed(path), reversed(key.split(".")), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    best = max(checkpoint.stored, key=common)
    weight = checkpoint.stored[best]
    # With the collection's and the table's name.
    if common(best) < 3 or not isinstance(weight, TensorStorageMetadata) or len(weight.size) != 2:
        return None
    return weight
