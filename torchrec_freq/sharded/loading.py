"""States that others have saved: row-wise Adagrad's, which has no counts, and version 0.2's.

``torch.distributed.checkpoint`` refuses a checkpoint that lacks a key of the state it loads into.
Where it has sums or counts of one of our tables, what is missing is left out of the plan, and is
completed when the optimizer's ``load_state_dict`` is called, which all ranks do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchrec_freq.counts.row_state import RowState
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


def _missing(wanted: frozenset[str], given: frozenset[str]) -> frozenset[str]:
    """The keys of a table's state that can be completed from those that are given."""
    missing = wanted - given
    if missing == _OURS and MOMENTUM in wanted or missing == {MOMENTUM}:
        return missing
    return frozenset()


def drop_missing(state_dict: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """A flat state without the keys of our tables that a checkpoint lacks, and others replace.

    Raises:
        ValueError: the checkpoint has the table in another number of column shards.
    """
    stored, dropped = metadata.state_dict_metadata, set()
    suffix = f".{ROW_COUNTER}"
    for key, counters in state_dict.items():
        if not (key.endswith(suffix) and isinstance(counters, RowState) and counters.on_missing):
            continue
        stem = key.removesuffix(suffix)
        keys = frozenset(k for k in (*_OURS, MOMENTUM) if f"{stem}.{k}" in state_dict)
        missing = _missing(keys, frozenset(k for k in keys if f"{stem}.{k}" in stored))
        if missing:
            counters.on_missing(missing)
            dropped |= {f"{stem}.{k}" for k in missing}
        sums, theirs = state_dict.get(f"{stem}.{MOMENTUM}"), stored.get(f"{stem}.{MOMENTUM}")
        if sums is not None and isinstance(theirs, TensorStorageMetadata):
            _require_size(stem, theirs.size[0], sums.size()[0], counters.shape[0])
    return {key: value for key, value in state_dict.items() if key not in dropped}


def _require_size(stem: str, saved: int, ours: int, rows: int) -> None:
    if saved != ours and saved % rows == 0:
        raise ValueError(
            f"{stem}.{MOMENTUM} was saved in {saved // rows} column shards, and this plan has "
            f"{ours // rows}. Load the rest without it, then call torchrec_freq.load_table_states("
            "model, torchrec_freq.read_table_states(checkpoint)), which takes the mean over the "
            "columns."
        )


def complete(optimizer: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state to load, with what it lacks of our tables replaced by what they have now.

    Raises:
        ValueError: what cannot be the state of one of our tables; nothing is changed.
    """
    state, completed = optimizer.state, dict(state_dict["state"])
    for key, weight in optimizer.params.items():
        ours = state.get(weight, {})
        counters = next((v for k, v in ours.items() if k.endswith(f".{ROW_COUNTER}")), None)
        if not isinstance(counters, RowState) or counters.on_missing is None:
            continue
        (name,) = {k.removesuffix(f".{ROW_COUNTER}") for k in ours if k.endswith(ROW_COUNTER)}
        given = {k.removeprefix(f"{name}."): v for k, v in completed.get(key, {}).items()}
        check_state(name, given, counters.shape[0])
        wanted = frozenset(k.removeprefix(f"{name}.") for k in ours)
        if missing := _missing(wanted, frozenset(given)):
            counters.on_missing(missing)
        # Sums that the paper's rule has no use for are left out.
        completed[key] = {k: given.get(k.removeprefix(f"{name}."), v) for k, v in ours.items()}
    return {**state_dict, "state": completed}
