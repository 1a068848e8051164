"""The form of the state that checkpoints hold for each table: keys, format, and its check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from torchrec_freq.engine.counters import check_counts

ROW_COUNTER: Final = "row_counter"
"""int32 [rows] of the whole table, under every sharding plan."""

TABLE_TOTALS: Final = "table_totals"
"""float64 [4]: ``STATE_FORMAT``, the sum of squares, the sum of counts, the occurrences that the
squares stand for."""

ROW_COUNTER_AGE: Final = "row_counter_age"
"""int64 [1]: steps since the counts were last halved."""

STATE_FORMAT: Final = 2
TOTALS: Final = 4


def check_state(table: str, states: Mapping[str, Any], rows: int) -> None:
    """Refuses what cannot be a table's state.

    Args:
        states: by key without the table's name.
        rows: of the table.

    Raises:
        ValueError: what is missing or wrong, and what to do.
    """
    advice = (
        "Load the model's weights without it, then either seed the counts, "
        "torchrec_freq.load_row_counts(model, counts), or start from zero by doing nothing."
    )
    if ROW_COUNTER not in states:
        raise ValueError(
            f"The optimizer state has no row counters of {table!r} ({ROW_COUNTER}): it is not one "
            f"of FrequencySGD. {advice}"
        )
    if TABLE_TOTALS not in states or ROW_COUNTER_AGE not in states:
        raise ValueError(
            f"The optimizer state of {table!r} is of torchrec_freq 0.1: it has no {TABLE_TOTALS}. "
            "Load the model's weights and the row counters alone, and give these to "
            "torchrec_freq.load_row_counts(model, counts); docs/checkpoints.md shows how."
        )
    totals = states[TABLE_TOTALS]
    if tuple(totals.shape) != (TOTALS,) or float(totals[0]) != STATE_FORMAT:
        raise ValueError(
            f"The {TABLE_TOTALS} of {table!r} are {totals.tolist()}, not of format {STATE_FORMAT}: "
            f"damaged, or of a later torchrec_freq. Upgrade it, or start anew. {advice}"
        )
    if not bool((torch.isfinite(totals) & (totals >= 0)).all()):
        raise ValueError(
            f"The {TABLE_TOTALS} of {table!r} must be finite and at least 0; got "
            f"{totals.tolist()}. {advice}"
        )
    if int(states[ROW_COUNTER_AGE]) < 0:
        raise ValueError(
            f"The {ROW_COUNTER_AGE} of {table!r} must be at least 0; got "
            f"{int(states[ROW_COUNTER_AGE])}. {advice}"
        )
    counts = states[ROW_COUNTER]
    if tuple(counts.shape) != (rows,):
        raise ValueError(
            f"Table {table!r} has {rows} rows; got row counters of shape {list(counts.shape)}."
        )
    for part in [s.tensor for s in counts.shards] if hasattr(counts, "shards") else [counts]:
        check_counts(table, part)
