"""Learning rates of rows, and how they spread over rows of equal count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_freq.analysis.traffic import bin_of, sum_by_count
from torchrec_freq.config import FrequencyConfig
from torchrec_freq.rule import may_move, mean_square, row_multiplier

QUANTILES: Final[Mapping[str, float]] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""Of the counts of the rows that have been seen."""


def learning_rates(
    config: FrequencyConfig,
    counts: Tensor,
    sums: Tensor | None = None,
    totals: Tensor | None = None,
    lr: float = 1.0,
) -> Tensor:
    r"""The rate of each row in its next step, before the square of that step's gradient.

    .. math:: \frac{\mathrm{lr}}{\sqrt{(1 - b_i) A_i + b_i \rho (c_i + 1)} + \mathrm{eps}}

    or the paper's, with ``normalize=None``: see :func:`torchrec_freq.rule.row_multiplier`.

    Args:
        config: of the table.
        counts: [rows] :math:`c_i`.
        sums: [rows] float32 :math:`A_i`; None where they are not known.
        totals: float64 [4] of the table, see :mod:`torchrec_freq.counts.state`; None likewise.
        lr: learning rate of the table, at least 0.

    Returns:
        float32 [rows], at least 0: 0 for a row that is not admitted in its next step, NaN where
        nothing is known, as before the first gradient.
    """
    if config.normalize is None:
        rates_R = row_multiplier(config, counts)
    elif sums is None or totals is None:
        rates_R = torch.full_like(counts, torch.nan, dtype=torch.float32)
    else:
        rho = mean_square(totals[1], totals[2]).to(counts.device)
        rates_R = row_multiplier(config, counts, sums, rho)
        known_R = (sums > 0) | (rho * config.prior_count > 0)
        rates_R = rates_R.where(known_R, torch.nan)
    return (rates_R * lr).where(may_move(config, counts + 1), 0.0)


def sum_rates(counts_R: Tensor, rates_R: Tensor) -> Tensor:
    """What :class:`RatesByCount` needs of some rows; the sums of parts add up.

    Args:
        counts_R: [rows] counts.
        rates_R: [rows] of :func:`learning_rates`.

    Returns:
        float64 [4, BINS], on the device of the counts.
    """
    counts_R, rates_R = counts_R[rates_R > 0], rates_R[rates_R > 0]
    logs_R = rates_R.double().log()
    return sum_by_count(counts_R, torch.ones_like(logs_R), counts_R, logs_R, logs_R.square())


@dataclass(frozen=True)
class RatesByCount:
    """Learning rates of rows with about equal counts, those that move and are known.

    Attributes:
        sums_4B: float64 [4, BINS] of :func:`sum_rates`.
    """

    sums_4B: Tensor

    def at(self, count: float) -> tuple[float, float] | None:
        """Rate of the rows with this count, and how it spreads; None where there are none.

        Args:
            count: from 0.

        Returns:
            The geometric mean, and the factor within which two thirds of the rows are, up and down
            (e to the standard deviation of the logarithm); 1 where all are equal.
        """
        rows, _, logs, squares = self.sums_4B[:, int(bin_of(torch.tensor(count)))].tolist()
        if rows == 0:
            return None
        mean = logs / rows
        return float(np.exp(mean)), float(np.exp(max(squares / rows - mean**2, 0.0) ** 0.5))

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """For a plot: [points] counts from 1 on, and for each the mean rate and its spread."""
        rows_B, counts_B = self.sums_4B[:2, 1:].numpy()
        counts = counts_B[rows_B > 0] / rows_B[rows_B > 0]
        points = [self.at(float(count)) for count in counts]
        means, spreads = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return counts, means, spreads
