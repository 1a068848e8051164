"""FrequencySGD: the optimizer class that opts tables in, and the same rule for unsharded tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchrec_freq.config import (
    DEFAULT_EPS,
    DEFAULT_OWN_WEIGHT,
    FIELDS,
    CountMode,
    FrequencyConfig,
    Normalize,
    check_learning_rate,
    config_of,
    refuse_coherence,
)
from torchrec_freq.counts.state import ROW_COUNTER, ROW_COUNTER_AGE, TABLE_TOTALS, check_state
from torchrec_freq.engine.counters import added, counted
from torchrec_freq.engine.totals import TableTotals, TotalsTable
from torchrec_freq.rule import entering_squares, row_multiplier


class FrequencySGD(torch.optim.Optimizer):
    r"""SGD for embedding tables with a learning rate a row that falls with the row's frequency.

    .. math::
        w_i \leftarrow w_i - \frac{\mathrm{lr}}{\sqrt{v_i} + \mathrm{eps}}\, g_i, \qquad
        v_i = \tfrac12 \left(G \frac{c_i}{C}
        + \mathrm{own\_weight} \cdot \mathrm{mean}_d(g_i^2)\right)

    :math:`c_i` is the number of occurrences of row ``i`` so far, this step included, and :math:`C`
    that of all rows of the table, :math:`g_i` the gradient of the mean loss of the global batch and
    :math:`G` the sum of :math:`\mathrm{mean}_d(g_i^2)` over the rows and the earlier steps
    (:mod:`torchrec_freq.rule`).

    Its main use is to be named, not stepped: TorchRec's sharded tables take it from
    ``apply_optimizer_in_backward`` and run the rule inside FBGEMM's backward.

    >>> from torch.distributed.optim import (
    ...     _apply_optimizer_in_backward as apply_optimizer_in_backward)
    >>> table = torch.nn.EmbeddingBag(10, 4, sparse=True)
    >>> apply_optimizer_in_backward(FrequencySGD, table.parameters(), {"lr": 0.05})

    ``step()`` applies the same rule to a parameter that is not sharded. It takes what it needs from
    the gradient: a sparse gradient (``sparse=True`` of ``nn.EmbeddingBag`` and ``nn.Embedding``)
    lists every occurrence; a dense one shows only which rows have a gradient, so it serves just
    ``count="batches"`` or ``"frozen"``.

    Args:
        params: embedding tables, each [rows, columns], or parameter groups.
        lr: learning rate, at least 0. That of row-wise Adagrad is the place to start.
        count, half_life, own_weight, normalize, min_count, eps: see
            :class:`torchrec_freq.FrequencyConfig`.
        coherence: an option of version 0.1; refused.

    Raises:
        ValueError: a wrong value, named with what to give instead.

    Source:
        Li et al., "Frequency-aware SGD for Efficient Embedding Learning with Provable Benefits",
        ICLR 2022 (``normalize=None``).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        count: CountMode = "samples",
        half_life: int | None = None,
        own_weight: float = DEFAULT_OWN_WEIGHT,
        normalize: Normalize | None = "table",
        min_count: float = 1,
        eps: float = DEFAULT_EPS,
        coherence: None = None,
    ) -> None:
        refuse_coherence(coherence)
        config = FrequencyConfig(
            count=count,
            half_life=half_life,
            own_weight=own_weight,
            normalize=normalize,
            min_count=min_count,
            eps=eps,
        )
        defaults = {"lr": check_learning_rate(lr), **dataclasses.asdict(config)}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_learning_rate(group["lr"])
            config_of(group)
            if unknown := group.keys() - {"params", "param_names", *defaults}:
                raise ValueError(
                    f"FrequencySGD has no option {', '.join(map(repr, sorted(unknown)))}. "
                    f"Its options are lr, {', '.join(FIELDS)}."
                )
            for param in group["params"]:
                if param.dim() != 2:
                    raise ValueError(
                        f"FrequencySGD is for embedding tables [rows, columns]; got a parameter of "
                        f"shape {list(param.shape)}. Give other parameters to another optimizer."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient.

        Raises:
            RuntimeError: a gradient that does not show what the rule needs.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, config_of(group), group["lr"])
        return loss

    def _step(self, param: Tensor, grad: Tensor, config: FrequencyConfig, lr: float) -> None:
        state = self.state[param]
        totals = TableTotals([TotalsTable(1, config)], param.device)
        if not state:
            state[ROW_COUNTER] = torch.zeros(len(param), dtype=torch.int32, device=param.device)
            state[TABLE_TOTALS] = totals.values[0].clone()
            state[ROW_COUNTER_AGE] = totals.ages.clone()
        rows_U, occurrences_U, grad_UD = _trained_rows(grad, config)
        if len(rows_U) == 0:
            # torch.distributed.checkpoint makes such a step to have a state to load into.
            return
        totals.values[0] = state[TABLE_TOTALS]
        totals.ages.copy_(state[ROW_COUNTER_AGE])
        before_U = state[ROW_COUNTER].index_select(0, rows_U)
        after_U = counted(config.count, before_U, before_U + occurrences_U)
        if config.count == "frozen" and not totals.values[0, 2] > 0:
            raise RuntimeError("count='frozen', but the optimizer's state has no counts: load one.")
        state[ROW_COUNTER].index_copy_(0, rows_U, after_U)

        per_count, limit = totals.rates()
        squares_U = grad_UD.to(torch.float32).square().mean(dim=1)
        multiplier_U = row_multiplier(config, after_U, squares_U, per_count)
        scaled_UD = (grad_UD * multiplier_U.unsqueeze(1)).to(param.dtype)
        param.index_add_(0, rows_U, scaled_UD, alpha=-lr)

        if config.normalize is None:
            squares_U.zero_()
        entering_U = entering_squares(squares_U, occurrences_U, limit) * occurrences_U
        sums = [entering_U.sum(), added(config.count, occurrences_U).sum(), occurrences_U.sum()]
        first = torch.zeros(1, dtype=torch.int64, device=param.device)
        totals.listen(lambda _, due: state[ROW_COUNTER].bitwise_right_shift_(len(due)))
        totals.add(first, *(value.view(1) for value in sums))
        totals.end_backward([0])
        totals.settle()
        state[TABLE_TOTALS].copy_(totals.values[0])
        state[ROW_COUNTER_AGE].copy_(totals.ages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer.

        Raises:
            ValueError: the state of another optimizer or version, or a damaged one.
        """
        states = state_dict["state"]
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params, strict=False):
            if key in states:
                check_state(f"parameter {key}", states[key], len(param))
        super().load_state_dict(state_dict)
        for key, param in zip(saved, params, strict=True):
            if key in states:
                # The base class casts states to the type of the parameter.
                state = {name: value.clone() for name, value in states[key].items()}
                for name in (ROW_COUNTER, TABLE_TOTALS):
                    state[name] = state[name].to(param.device)
                self.state[param] = state


def _trained_rows(grad: Tensor, config: FrequencyConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a gradient that is not 0, how often each occurred, and its gradient.

    Raises:
        RuntimeError: the gradient does not show what ``config.count`` needs.
    """
    if not grad.is_sparse:
        rows_U = grad.any(dim=1).nonzero().squeeze(1)
        if config.count == "samples" and len(rows_U):
            raise RuntimeError(
                "a dense gradient shows which rows occurred, not how often. Build the table "
                "with sparse=True, shard it with TorchRec, or use count='batches'."
            )
        return rows_U, torch.ones_like(rows_U, dtype=torch.int32), grad.index_select(0, rows_U)
    # torch calls a gradient of one lookup coalesced, too: it is taken for one.
    if grad.is_coalesced() and config.count == "samples" and grad._nnz() > 1:
        raise RuntimeError(
            "the sparse gradient is coalesced, which loses how often each row occurred. Do not "
            "coalesce or clip it before step(), or use count='batches'."
        )
    rows_L, grad_LD = grad._indices()[0], grad._values()
    trained_L = grad_LD.ne(0).any(dim=1)
    rows_U, inverse_L = rows_L[trained_L].unique(return_inverse=True)
    occurrences_U = torch.zeros_like(rows_U, dtype=torch.int32)
    occurrences_U.scatter_add_(0, inverse_L, torch.ones_like(inverse_L, dtype=torch.int32))
    grad_UD = grad_LD.new_zeros(len(rows_U), grad_LD.shape[1])
    return rows_U, occurrences_U, grad_UD.index_add_(0, inverse_L, grad_LD[trained_L])
