"""The update rule: one pure function from a row's count to what its gradient is multiplied by.

Shape suffixes in this package: ``_L`` lookups (ids) of a batch, ``_R`` rows, ``_T`` tables,
``_F`` features, ``_B`` samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_freq.config import FrequencyConfig


def row_multiplier(
    config: FrequencyConfig,
    counts: Tensor,
    steps: Tensor | int | None = None,
    inverse_scale: Tensor | None = None,
) -> Tensor:
    r"""Learning rate of rows as a multiple of ``lr``, elementwise.

    .. math::
        e_i = c_i \left(1 + \mathrm{coherence} \cdot \frac{c_i}{n}\right), \qquad
        m_i = \frac{1}{s_t \sqrt{\max(e_i, \mathrm{min\_count})}}, \qquad
        w_i \leftarrow w_i - \mathrm{lr} \cdot m_i \cdot g_i

    The square of a row's gradient, summed over the steps, grows like :math:`s_t^2 e_i`: of the
    ``k = c_i / n`` occurrences of a row in a mean batch each adds its variance, and what they agree
    on adds in amplitude. So :math:`m_i` is the rate of row-wise Adagrad, predicted from one count.

    Args:
        config: the rule's constants.
        counts: [...] occurrences of the row so far, this step included (:math:`c_i`), any dtype.
        steps: [...] steps of the row's table so far, this one included (:math:`n \ge 1`); or a
            number, where it is that of all rows. Not used, and may be None, where
            ``config.coherence`` is 0.
        inverse_scale: [...] :math:`1 / s_t` of the row's table, 0 while the scale is not known.
            Not used, and may be None, where ``config.normalize`` is None.

    Returns:
        [...] float32 multipliers, finite and at least 0.

    Source:
        ``coherence=0, min_count=1, normalize=None`` is counter-based SGD (and, with frozen counts,
        FA-SGD) of Li et al., "Frequency-aware SGD for Efficient Embedding Learning with Provable
        Benefits", ICLR 2022. Coherence and table scale are this package's.
    """
    # In place: here a step needs the most memory, and each temporary is as long as its lookups.
    effective = counts.to(torch.float32, copy=True)
    if config.coherence:
        if steps is None:
            raise ValueError("row_multiplier needs steps where coherence is not 0")
        effective.addcmul_(effective, effective / steps, value=config.coherence)
    multiplier = effective.clamp_(min=config.min_count).rsqrt_()
    if config.normalize is not None:
        if inverse_scale is None:
            raise ValueError("row_multiplier needs inverse_scale where normalize is not None")
        multiplier.mul_(inverse_scale)
    return multiplier
