"""Counts in plan-independent form: read them off a sharded model, and put them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_freq.counters import COUNT_CEILING
from torchrec_freq.register import FrequencyTables, Table, frequency_modules

_CHUNK_ROWS = 1 << 24
"""Rows summed over the ranks at once: bounds the device memory that a large table needs."""


def row_counts(model: nn.Module) -> dict[str, Tensor]:
    """Counts of every table that trains with FrequencySGD, the same on every rank.

    All ranks must call it.

    Returns:
        table name -> int64 CPU tensor [num_embeddings]: occurrences of each row so far, halved by
        ``half_life``, at most ``torchrec_freq.COUNT_CEILING``. Tables of the same name in two
        modules are told apart by the module's path, as in ``"user_arch.ebc.item"``.

    Raises:
        ValueError: no table of the model trains with FrequencySGD.
    """
    counts: dict[str, Tensor] = {}
    for name, (handle, table) in _tables(model).items():
        counts_R = torch.zeros(table.rows, dtype=torch.int64)
        for shard in handle.shards:
            if shard.table is table and shard.primary:
                local_R = shard.group.counters.read(shard.index).cpu()
                counts_R[shard.row_offset : shard.row_offset + local_R.numel()] = local_R
        if handle.process_group is not None and handle.process_group.size() > 1:
            for chunk_R in counts_R.split(_CHUNK_ROWS):
                summed_R = chunk_R.to(handle.scales.totals.device)
                dist.all_reduce(summed_R, group=handle.process_group)
                chunk_R.copy_(summed_R)
        counts[name] = counts_R
    return counts


def load_row_counts(
    model: nn.Module, counts: Mapping[str, Tensor], steps: int | None = None
) -> None:
    """Sets the counts of some or all tables, under any sharding plan.

    All ranks must call it with the same counts. Nothing is changed where anything is wrong.

    Args:
        counts: table name -> [num_embeddings] whole numbers from 0 to
            ``torchrec_freq.COUNT_CEILING``, of any dtype.
        steps: the number of optimizer steps that the counts stand for, at least 1. It gives the
            mean occurrences a step that ``coherence`` needs. None keeps the steps of each table,
            which must have trained, unless its ``coherence`` is 0.

    Raises:
        ValueError: an unknown table, a wrong length, a count that is negative, not whole or too
            large, or missing steps; the message names the table.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"Invalid steps value: {steps!r}. Must be a whole number >= 1, or None.")
    tables = _tables(model)
    for name, counts_R in counts.items():
        if name not in tables:
            raise ValueError(
                f"No table {name!r} trains with FrequencySGD. Tables: {', '.join(tables)}."
            )
        _check(tables[name][1], counts_R)
    if steps is None:
        _require_steps({name: tables[name] for name in counts})
    for name, counts_R in counts.items():
        handle, table = tables[name]
        for shard in handle.shards:
            if shard.table is table:
                counters = shard.group.counters
                rows = counters.rows_per_table[shard.index]
                local_R = counts_R[shard.row_offset : shard.row_offset + rows]
                kept = counters.steps[shard.index] or 1
                counters.load(shard.index, local_R, kept if steps is None else steps)


def _tables(model: nn.Module) -> dict[str, tuple[FrequencyTables, Table]]:
    """Tables by name, or by path and name where two modules have one of that name."""
    found = [
        (path, handle, table)
        for path, handle in frequency_modules(model)
        for table in handle.tables.values()
    ]
    if not found:
        raise ValueError(
            "No table of this model trains with FrequencySGD: name it in "
            "apply_optimizer_in_backward, or in the sharder's fused_params, before sharding."
        )
    uses = Counter(table.name for _, _, table in found)
    return {
        table.name if uses[table.name] == 1 else f"{path}.{table.name}": (handle, table)
        for path, handle, table in found
    }


def _require_steps(tables: Mapping[str, tuple[FrequencyTables, Table]]) -> None:
    """Refuses, on every rank alike, a table that needs a number of steps and has none."""
    for name, (handle, table) in tables.items():
        missing = any(
            shard.group.config.coherence and not shard.group.counters.steps[shard.index]
            for shard in handle.shards
            if shard.table is table
        )
        missing_ranks = torch.tensor(int(missing), device=handle.scales.totals.device)
        if handle.process_group is not None and handle.process_group.size() > 1:
            dist.all_reduce(missing_ranks, group=handle.process_group)
        if missing_ranks:
            raise ValueError(
                f"Table {name!r} has not trained yet: give steps, the number of optimizer steps "
                "that the counts stand for (samples / global batch size)."
            )


def _check(table: Table, counts_R: Tensor) -> None:
    if tuple(counts_R.shape) != (table.rows,):
        raise ValueError(
            f"Table {table.name!r} has {table.rows} rows; got counts of shape "
            f"{list(counts_R.shape)}."
        )
    if counts_R.is_complex() or counts_R.dtype == torch.bool:
        raise ValueError(f"Table {table.name!r}: counts cannot be {counts_R.dtype}.")
    if counts_R.is_floating_point() and not bool((counts_R.frac() == 0).all()):
        raise ValueError(
            f"Table {table.name!r}: counts must be whole numbers, without NaN or infinity."
        )
    least, most = (int(value) for value in counts_R.aminmax()) if table.rows else (0, 0)
    if least < 0 or most > COUNT_CEILING:
        raise ValueError(
            f"Table {table.name!r}: counts must lie in 0 to {COUNT_CEILING}; got {least} to {most}."
        )
