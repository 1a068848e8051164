"""The rule where FBGEMM's kernel does not run it: a step of rows whose gradient is at hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import COUNT_CEILING
from torchrec_freq.engine.totals import TableTotals
from torchrec_freq.rule import may_move, row_multiplier


class DenseStep(NamedTuple):
    """What a step makes of rows.

    Attributes:
        multiplier_R: float32 [rows] what lr and the gradient are multiplied by.
        counts_R: int32 [rows] counts after the step.
        sums_R: float32 [rows] sums of squares after it.
    """

    multiplier_R: Tensor
    counts_R: Tensor
    sums_R: Tensor


def dense_step(
    config: FrequencyConfig,
    totals: TableTotals,
    position: int,
    counts_R: Tensor,
    sums_R: Tensor,
    occurrences_R: Tensor,
    gradient_RD: Tensor,
) -> DenseStep:
    """A step of distinct rows of a table; adds what they had to its totals.

    Args:
        position: of the table in ``totals``.
        counts_R: int32 [rows] counts before the step.
        sums_R: float32 [rows] sums of squares before it.
        occurrences_R: int32 [rows] occurrences in the global batch.
        gradient_RD: [rows, columns] gradient of the mean loss of the global batch.
    """
    after_R = counts_R
    if config.count != "frozen":
        after_R = (counts_R + occurrences_R).clamp_(max=COUNT_CEILING)
    squares_R = gradient_RD.to(torch.float32).square().mean(dim=1)
    rho = totals.rho().narrow(0, position, 1)
    counted_R = after_R if config.normalize is None else counts_R
    multiplier_R = row_multiplier(config, counted_R, sums_R, rho, squares_R)
    admitted_R = may_move(config, after_R)
    if config.normalize is not None:
        squares_R = squares_R.where(admitted_R, 0.0)
        sums_R = sums_R + squares_R
        if config.prior_count > 0 and totals.sampled():
            occurrences = occurrences_R.where(admitted_R, 0).sum().view(1)
            position_1 = torch.full((1,), position, device=counts_R.device)
            squares = squares_R.nan_to_num(0.0, 0.0, 0.0).sum(dtype=torch.float64).view(1)
            totals.add(position_1, squares, occurrences.double())
    return DenseStep(multiplier_R * admitted_R, after_R, sums_R)
