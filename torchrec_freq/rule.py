r"""The update rule, as pure functions of tensors.

A row :math:`i` of table :math:`t` that occurs :math:`k_i` times in the global batch, with the
gradient :math:`g_i` (of the mean loss of the global batch, summed over the occurrences):

.. math::
    c_i &\leftarrow c_i + k_i \\
    P_i &= G_t \, c_i / C_t \\
    v_i &= \tfrac12 \left(P_i + \mathrm{own\_weight} \cdot \mathrm{mean}_d(g_i^2)\right) \\
    w_i &\leftarrow w_i - \frac{\mathrm{lr}}{\sqrt{v_i} + \mathrm{eps}} \, g_i \\
    G_t &\leftarrow G_t + \textstyle\sum_i \mathrm{mean}_d(g_i^2), \qquad
    C_t \leftarrow C_t + \textstyle\sum_i k_i

It is row-wise Adagrad whose sum of squares of a row is replaced by the table's sum times the row's
share of the occurrences, and whose steps are softly clipped by the row's own square. The rate is
that of FA-SGD, proportional to :math:`1 / \sqrt{p_i}` with :math:`p_i = c_i / C_t`, and its
constant is that of AdaGrad-Norm, found by the data.

Sources: Li et al., "Frequency-aware SGD for Efficient Embedding Learning with Provable Benefits",
ICLR 2022 (FA-SGD, and counter-based SGD, which is ``normalize=None``); Ward, Wu, Bottou, "AdaGrad
stepsizes: sharp convergence over nonconvex landscapes", ICML 2019 (AdaGrad-Norm). The own square is
this package's.

Shape suffixes in this package: ``_L`` lookups (ids) of a batch, ``_R`` rows, ``_T`` tables, ``_F``
features, ``_B`` bags, ``_D`` columns, ``_S`` features of all tables of a sharded module.
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

SQUARE_LIMIT: Final = 1000.0
"""An occurrence adds at most this many times the mean to its table's sum of squares."""


def squares_per_count(squares: Tensor, counts: Tensor) -> Tensor:
    r""":math:`G_t / C_t`, elementwise, in the type of ``squares``; 0 where ``counts`` is 0.

    Args:
        squares: [...] :math:`G_t`, at least 0.
        counts: [...] :math:`C_t`, at least 0.
    """
    return (squares / counts).nan_to_num_(nan=0.0, posinf=0.0)


def predicted_squares(counts: Tensor, per_count: Tensor) -> Tensor:
    r""":math:`P_i = G_t c_i / C_t`: what a row of this count has had of its table's squares.

    Args:
        counts: [...] :math:`c_i`, this step included, any dtype.
        per_count: [...] float32 :math:`G_t / C_t` of the row's table, before this step.

    Returns:
        [...] float32.
    """
    return per_count * counts


def row_multiplier(
    config: FrequencyConfig,
    counts: Tensor,
    squares: Tensor | None = None,
    per_count: Tensor | None = None,
) -> Tensor:
    r"""What ``lr`` and the gradient of a row are multiplied by, elementwise.

    .. math::
        \left(\sqrt{v_i} + \mathrm{eps}\right)^{-1}, \qquad\text{or, with normalize=None,}\qquad
        \left(\sqrt{\max(c_i, \mathrm{min\_count})} + \mathrm{eps}\right)^{-1}

    Args:
        config: the rule's constants.
        counts: [...] :math:`c_i`, this step included, any dtype.
        squares: [...] :math:`\mathrm{mean}_d(g_i^2)`; not used where ``config.normalize`` is None.
        per_count: [...] :math:`G_t / C_t` before this step; likewise.

    Returns:
        [...] float32, at least 0, and finite where the gradient is.
    """
    if config.normalize is None:
        root = counts.to(torch.float32).clamp(min=config.min_count).sqrt_()
    else:
        assert squares is not None and per_count is not None
        own = squares.to(torch.float32) * config.own_weight
        root = (predicted_squares(counts, per_count) + own).mul_(0.5).sqrt_()
    return root.add_(config.eps).reciprocal_()


def entering_squares(squares: Tensor, occurrences: Tensor, limit: Tensor) -> Tensor:
    """What each occurrence of a row adds to the sum of its table, elementwise.

    What is not finite adds nothing, and the rest at most ``limit``, so that no single row slows its
    table for good.

    Args:
        squares: [...] float32, mean square of the row's gradient.
        occurrences: [...] how often the row occurred in the step; of 0 comes 0.
        limit: [...] float32, ``SQUARE_LIMIT`` times what an occurrence had on average so far;
            infinite where there was none.

    Returns:
        [...] float32.
    """
    each = torch.nan_to_num(squares / occurrences, nan=0.0, posinf=0.0, neginf=0.0)
    return torch.minimum(each, limit)


def kernel_factor(config: FrequencyConfig) -> float:
    r"""What lr and eps are multiplied by where FBGEMM's row-wise Adagrad applies the rule.

    Its kernel moves a row by :math:`\mathrm{lr}' g / (\sqrt{m + \mathrm{mean}_d(g^2)} +
    \mathrm{eps}')`, which is the rule for :math:`m` of :func:`lent_squares` and this factor.
    """
    return math.sqrt(_KERNEL_UNIT if config.normalize is None else 2 / config.own_weight)


def lent_squares(config: FrequencyConfig, counts: Tensor, unit: Tensor | None) -> Tensor:
    """What FBGEMM's row-wise Adagrad is to take for the sums of squares of rows.

    Args:
        counts: [...] this step included, any dtype.
        unit: [...] float32 ``per_count / own_weight`` of the row's table, with ``per_count`` of
            :func:`predicted_squares`; None with ``normalize=None``.

    Returns:
        [...] float32.
    """
    if config.normalize is None:
        return counts.to(torch.float32).clamp_(min=config.min_count).mul_(_KERNEL_UNIT)
    assert unit is not None
    return unit * counts
