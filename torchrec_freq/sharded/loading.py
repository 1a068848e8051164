"""States that others have saved: row-wise Adagrad, version 0.2, and plans with other columns.

``torch.distributed.checkpoint`` refuses a checkpoint that lacks a key of the state it loads into,
or has a tensor of another size. For our tables both can be helped: what is missing is left out of
the plan, sums of other column shards are read into tensors of their own, and all is completed when
the optimizer's ``load_state_dict`` is called, which all ranks do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.state import (
    MOMENTUM,
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    TABLE_TOTALS,
    check_state,
)
from torchrec_freq.sharded.tables import FrequencyTables

_OURS: Final = frozenset({ROW_COUNTER, ROW_COUNTER_AGE, TABLE_TOTALS})
_TABLES: Final = "_frequency_tables"


def mark(optimizer: Any, tables: FrequencyTables) -> None:
    """Remembers the tables of a sharded module in its optimizer, which every rank has."""
    setattr(optimizer, _TABLES, tables)


def marked(optimizer: Any) -> Iterator[FrequencyTables]:
    """The tables of all modules that an optimizer stands for."""
    if (tables := getattr(optimizer, _TABLES, None)) is not None:
        yield tables
    for _, part in getattr(optimizer, "_optims", ()):
        yield from marked(part)
    if (wrapped := getattr(optimizer, "_optimizer", None)) is not None:
        yield from marked(wrapped)


def complete(optimizer: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state to load, in which what it lacks of our tables is replaced by what they have now.

    Raises:
        ValueError: what cannot be the state of one of our tables; nothing is changed.
    """
    state, completed = optimizer.state, dict(state_dict["state"])
    lacking: list[tuple[FrequencyTables, str, frozenset[str]]] = []
    for key, weight in optimizer.params.items():
        ours = state.get(weight, {})
        counters = next((v for k, v in ours.items() if k.endswith(f".{ROW_COUNTER}")), None)
        if not isinstance(counters, RowState) or counters.owner is None:
            continue
        tables, name = counters.owner
        given = {k.removeprefix(f"{name}."): v for k, v in completed.get(key, {}).items()}
        check_state(name, given, counters.shape[0])
        wanted = frozenset(k.removeprefix(f"{name}.") for k in ours)
        lacking.append((tables, name, _replaceable(wanted, frozenset(given))))
        # Sums that the paper's rule has no use for are left out.
        completed[key] = {k: given.get(k.removeprefix(f"{name}."), v) for k, v in ours.items()}
    for tables, name, missing in lacking:
        if missing:
            tables.lacks(name, missing)
    return {**state_dict, "state": completed}


def adapt(state_dict: dict[str, Any], metadata: Metadata) -> None:
    """Makes of a flat state one that DCP can load from a checkpoint, in place."""
    stored = metadata.state_dict_metadata
    for key, counters in list(state_dict.items()):
        if not isinstance(counters, RowState) or counters.owner is None:
            continue
        tables, name = counters.owner
        stem = key.removesuffix(ROW_COUNTER)
        keys = frozenset(k for k in (*_OURS, MOMENTUM) if stem + k in state_dict)
        if missing := _replaceable(keys, frozenset(k for k in keys if stem + k in stored)):
            tables.lacks(name, missing)
            for k in missing:
                del state_dict[stem + k]
        sums, saved = state_dict.get(stem + MOMENTUM), stored.get(stem + MOMENTUM)
        rows = counters.shape[0]
        if (
            sums is not None
            and isinstance(saved, TensorStorageMetadata)
            and saved.size != sums.size()
            and saved.size[0] % rows == 0
        ):
            shares = _column_shares(name, saved.size[0] // rows, metadata)
            state_dict[stem + MOMENTUM] = _staged(tables, sums, rows, shares)


def _replaceable(wanted: frozenset[str], given: frozenset[str]) -> frozenset[str]:
    """The missing keys of a table's state, where the others make up for them."""
    missing = wanted - given
    if missing == {MOMENTUM} or (missing == _OURS and MOMENTUM in wanted):
        return missing
    return frozenset()


def _column_shares(name: str, shards: int, metadata: Metadata) -> Tensor:
    """float32 [shards]: the parts of a table's columns that its saved shards had."""
    for key, saved in metadata.state_dict_metadata.items():
        if key.endswith(f".{name}.weight") and isinstance(saved, TensorStorageMetadata):
            columns = sorted({(c.offsets[-1], c.sizes[-1]) for c in saved.chunks})
            if len(columns) == shards:
                return torch.tensor([width for _, width in columns]) / saved.size[-1]
    return torch.full((shards,), 1 / shards)


def _staged(tables: FrequencyTables, sums: Any, rows: int, shares: Tensor) -> RowState:
    """A place for the sums of this rank's rows from all saved column shards.

    They become their mean over the columns, in each of this plan's.
    """
    shards = []
    for first, part_R in _local_parts(sums):
        parts = [part_R.new_zeros(part_R.shape) for _ in shares]
        shards += [
            RowShard(number * rows + first % rows, False, part) for number, part in enumerate(parts)
        ]
        tables.finish_later(partial(_combine, part_R, parts, shares.tolist()))
    return RowState(len(shares) * rows, shards)


def _combine(target_R: Tensor, parts: list[Tensor], shares: list[float]) -> None:
    target_R.zero_()
    for part_R, share in zip(parts, shares, strict=True):
        target_R.add_(part_R, alpha=share)


def _local_parts(sums: Any) -> Iterator[tuple[int, Tensor]]:
    """First element of each part of a sharded tensor on this rank, and its memory."""
    if isinstance(sums, RowState):
        for part in sums.shards:
            yield part.row_offset, part.tensor
    elif isinstance(sums, DTensor):
        local: Any = sums.to_local()
        # Where there is no shard it may name an offset all the same.
        for offset, part_R in zip(local.local_offsets(), local.local_shards(), strict=False):
            yield offset[0], part_R
    else:
        for shard in sums.local_shards():
            yield shard.metadata.shard_offsets[0], shard.tensor
