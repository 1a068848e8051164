r"""The update rule, as pure functions of tensors.

Row :math:`i` of table :math:`t` occurs :math:`k_i` times in the step's global batch and has the
gradient :math:`g_i` (of the mean loss of the global batch, summed over the occurrences). Its count
:math:`c_i` and its sum of squares :math:`A_i` are those before the step:

.. math::
    \rho_t &= G_t / C_t \\
    b_i &= \mathrm{prior\_count} / (c_i + \mathrm{prior\_count}) \\
    v_i &= (1 - b_i) A_i + b_i \rho_t (c_i + 1) + \mathrm{mean}_d(g_i^2) \\
    w_i &\leftarrow w_i - \frac{\mathrm{lr}}{\sqrt{v_i} + \mathrm{eps}} \, g_i \\
    A_i &\leftarrow A_i + \mathrm{mean}_d(g_i^2), \qquad c_i \leftarrow c_i + k_i

In a sampled step, which stands for :math:`n` steps,

.. math::
    G_t \leftarrow G_t + n \min\left(\textstyle\sum_i \mathrm{mean}_d(g_i^2), \mathrm{cap}_t\right),
    \qquad C_t \leftarrow C_t + n \textstyle\sum_i k_i

where squares that are not finite are left out. This is row-wise Adagrad, except that the sum of
squares of a young row is mostly what the table predicts for its count: :math:`\rho_t` is the mean
square of an occurrence. For a rare row the rate is that of FA-SGD, proportional to
:math:`1 / \sqrt{c_i}`; for a row with a history it is Adagrad's.

Sources: Li et al., "Frequency-aware SGD for Efficient Embedding Learning with Provable Benefits",
ICLR 2022 (FA-SGD, and counter-based SGD, which is ``normalize=None``); Duchi, Hazan, Singer,
"Adaptive subgradient methods", JMLR 2011. The mixture is this package's.

Shape suffixes in this package: ``_L`` lookups (ids) of a batch, ``_R`` rows, ``_T`` tables, ``_F``
features, ``_B`` bags, ``_D`` columns, ``_U`` distinct rows of a batch.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from torchrec_freq.config import FrequencyConfig

_KERNEL_UNIT: Final = 2.0**96
"""What a count of 1 weighs in FBGEMM's sum of squares under the paper's rule. Beside it the row's
own square vanishes in float32, up to gradients of 7e10, and 2^30 counts still fit."""

FIRST_STEPS: Final = 64
"""Steps at the start of a history that are all sampled."""
SAMPLED_SHARE: Final = 8
"""After that one step in so many is sampled, and stands for as many."""


def sample_weight(step: int) -> int:
    """How many steps the table's sums take this one for: 0 where it is not sampled.

    The sampled steps are spread by a multiple of the golden ratio. They have no period, so a task
    that trains every 2nd, 4th or 8th step is sampled as often as any other.

    Args:
        step: its number, from 0.
    """
    if step < FIRST_STEPS:
        return 1
    return SAMPLED_SHARE if step * 2654435761 % 2**32 < 2**32 // SAMPLED_SHARE else 0


def mean_square(squares: Tensor, counts: Tensor) -> Tensor:
    r""":math:`\rho_t = G_t / C_t` as float32, elementwise; 0 where ``counts`` is 0.

    Args:
        squares: [...] :math:`G_t`, at least 0.
        counts: [...] :math:`C_t`, at least 0.
    """
    return (squares / counts).nan_to_num_(nan=0.0, posinf=0.0).to(torch.float32)


def prior_change(
    config: FrequencyConfig, counts: Tensor, sums: Tensor, prior_squares: Tensor
) -> Tensor:
    r""":math:`b_i (\rho_t (c_i + 1) - A_i)`: what the table's prediction adds to a row's own sum.

    Args:
        counts: [...] :math:`c_i`, any dtype.
        sums: [...] float32 :math:`A_i`.
        prior_squares: float32 [...] of :func:`prior_squares`; expands to the shape of ``counts``.

    Returns:
        [...] float32.
    """
    counts = counts.to(torch.float32, copy=True)
    change = torch.addcmul(prior_squares, counts, prior_squares)
    if config.prior_count == math.inf:
        return change.sub_(sums)
    if config.prior_count == 0:
        return torch.zeros_like(sums)
    return change.sub_(sums, alpha=config.prior_count).div_(counts.add_(config.prior_count))


def prior_squares(config: FrequencyConfig, rho: Tensor) -> Tensor:
    r""":math:`\mathrm{prior\_count}\, \rho_t`, or :math:`\rho_t` where the prior is infinite.

    Args:
        rho: float32 [...] :math:`\rho_t`.
    """
    return rho if config.prior_count == math.inf else rho * config.prior_count


def past_squares(config: FrequencyConfig, counts: Tensor, sums: Tensor, rho: Tensor) -> Tensor:
    r""":math:`(1 - b_i) A_i + b_i \rho_t (c_i + 1)`: :math:`v_i` without the square of the step.

    Args:
        counts: [...] :math:`c_i`, any dtype.
        sums: [...] float32 :math:`A_i`.
        rho: float32 [...] :math:`\rho_t`; expands to the shape of ``counts``.

    Returns:
        [...] float32.
    """
    return sums + prior_change(config, counts, sums, prior_squares(config, rho))


def row_multiplier(
    config: FrequencyConfig,
    counts: Tensor,
    sums: Tensor | None = None,
    rho: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    r"""What ``lr`` and the gradient of a row are multiplied by, elementwise.

    .. math::
        \left(\sqrt{v_i} + \mathrm{eps}\right)^{-1}, \qquad\text{or, with normalize=None,}\qquad
        \left(\sqrt{\max(c_i, \mathrm{min\_count})} + \mathrm{eps}\right)^{-1}

    and 0 where admit is not reached.

    Args:
        config: the rule's constants.
        counts: [...] :math:`c_i`, any dtype: before the step, with ``normalize=None`` with it.
        sums: [...] float32 :math:`A_i` before the step; not used with ``normalize=None``.
        rho: float32 [...] :math:`\rho_t`; expands to the shape of ``counts``; likewise.
        squares: [...] :math:`\mathrm{mean}_d(g_i^2)`; None takes 0.

    Returns:
        [...] float32.
    """
    if config.normalize is None:
        root = counts.to(torch.float32).clamp(min=config.min_count).sqrt_()
    else:
        assert sums is not None and rho is not None
        root = past_squares(config, counts, sums, rho)
        if squares is not None:
            root += squares
        root.sqrt_()
    return root.add_(config.eps).reciprocal_()


def may_move(config: FrequencyConfig, counts: Tensor) -> Tensor:
    """bool [...]: whether rows move. With ``admit=1`` all do, those of frozen counts of 0 too.

    Args:
        counts: [...] with this step.
    """
    return counts >= (config.admit if config.admit > 1 else 0)


def cap_squares(totals: Tensor, steps: Tensor) -> Tensor:
    r"""What a step adds to :math:`G_t` at most, elementwise.

    Three times the mean step so far, or a tenth of :math:`G_t` where that is more, from the 4th
    step on: one bad gradient slows no other row for long.

    Args:
        totals: [...] :math:`G_t` before the step.
        steps: [...] steps that :math:`G_t` stands for.
    """
    cap = torch.maximum((totals / steps).mul_(3), totals * 0.1)
    return cap.masked_fill_(steps < 3, torch.inf)


def kernel_factor(config: FrequencyConfig) -> float:
    r"""What lr and eps are multiplied by where FBGEMM's row-wise Adagrad applies the rule.

    Its kernel moves a row by :math:`\mathrm{lr}' g / (\sqrt{m + \mathrm{mean}_d(g^2)} +
    \mathrm{eps}')`. With ``normalize=None`` :math:`m` is :func:`kernel_counts`.
    """
    return math.sqrt(_KERNEL_UNIT) if config.normalize is None else 1.0


def kernel_counts(config: FrequencyConfig, counts: Tensor) -> Tensor:
    """The accumulators with which FBGEMM's row-wise Adagrad applies the paper's rule.

    Args:
        counts: [...] with this step, any dtype.

    Returns:
        [...] float32.
    """
    return counts.to(torch.float32).clamp_(min=config.min_count).mul_(_KERNEL_UNIT)
