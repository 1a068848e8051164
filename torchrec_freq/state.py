"""Counts in plan-independent form: read them off a sharded model, and put them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrec_freq.counters import check_counts
from torchrec_freq.register import frequency_modules
from torchrec_freq.tables import FrequencyTables, Table


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
    return {
        name: handle.read(table.name).counts
        for name, (handle, table) in named_tables(model).items()
    }


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
    tables = named_tables(model)
    known: dict[str, int] = {}
    for name, counts_R in counts.items():
        if name not in tables:
            raise ValueError(
                f"No table {name!r} trains with FrequencySGD. Tables: {', '.join(tables)}."
            )
        rows = tables[name][1].rows
        if tuple(counts_R.shape) != (rows,):
            raise ValueError(
                f"Table {name!r} has {rows} rows; got counts of shape {list(counts_R.shape)}."
            )
        check_counts(name, counts_R)
    for name in counts:
        handle, table = tables[name]
        known[name] = handle.steps(table.name) if steps is None else steps
        if known[name] == 0 and table.config.coherence:
            raise ValueError(
                f"Table {name!r} has not trained yet: give steps, the number of optimizer steps "
                "that the counts stand for (samples / global batch size)."
            )
    for name, counts_R in counts.items():
        handle, table = tables[name]
        handle.load_counts(table.name, counts_R, torch.tensor([max(known[name], 1), 0]))


def named_tables(model: nn.Module) -> dict[str, tuple[FrequencyTables, Table]]:
    """Tables by name, or by path and name where two modules have one of that name.

    Raises:
        ValueError: no table of the model trains with FrequencySGD.
    """
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
