"""Learning rates of rows by their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.rule import row_multiplier

QUANTILES: Final[Mapping[str, float]] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""Of the counts of the rows that have been seen."""


def learning_rates(
    config: FrequencyConfig,
    counts: Sequence[float],
    totals: Sequence[float] | None = None,
    lr: float = 1.0,
) -> list[float]:
    """What ``lr`` is for rows with these counts, by :func:`torchrec_freq.rule.row_multiplier`.

    The row's own square is taken to be the mean of an occurrence, ``s ** 2``.

    Args:
        config: of the table.
        counts: of the rows, at least 0.
        totals: [4] of the table, see :mod:`torchrec_freq.counts.state`; None where they are not
            known: the rates are then multiples of ``1 / s``. Not used where the table is not
            normalized.
        lr: learning rate of the table, at least 0.

    Returns:
        A rate for each count, at least 0.
    """
    _, squares, sum_of_counts, occurrences = totals or (0, 1.0, 1.0, 1.0)
    multipliers = row_multiplier(
        config,
        torch.tensor(counts),
        torch.tensor(squares / occurrences),
        torch.tensor(squares / sum_of_counts),
    )
    return [lr * multiplier for multiplier in multipliers.tolist()]
