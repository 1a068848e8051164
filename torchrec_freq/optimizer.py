"""FrequencySGD: the optimizer class that opts tables in, and the same rule for unsharded tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchrec_freq.config import (
    FIELDS,
    FrequencyConfig,
    Options,
    check_learning_rate,
    make_config,
)
from torchrec_freq.counts.conversion import with_counts_of_sums, with_sums_of_counts
from torchrec_freq.counts.state import (
    MOMENTUM,
    OLD_FORMAT,
    ROW_COUNTER,
    ROW_COUNTER_AGE,
    TABLE_TOTALS,
    TableState,
    check_state,
    totals_of,
)
from torchrec_freq.engine.dense import dense_step
from torchrec_freq.engine.totals import TableTotals


class FrequencySGD(torch.optim.Optimizer):
    r"""SGD for embedding tables with a learning rate a row that falls with the row's frequency.

    .. math::
        w_i \leftarrow w_i - \frac{\mathrm{lr}}{\sqrt{v_i} + \mathrm{eps}}\, g_i, \qquad
        v_i = (1 - b_i) A_i + b_i \frac{G}{C} (c_i + 1) + \mathrm{mean}_d(g_i^2), \qquad
        b_i = \frac{\mathrm{prior\_count}}{c_i + \mathrm{prior\_count}}

    :math:`c_i` is how often row ``i`` occurred so far and :math:`A_i` the sum of its mean squared
    gradients, as in row-wise Adagrad; :math:`C` and :math:`G` are the table's sums of these.
    :math:`g_i` is the gradient of the mean loss of the global batch (:mod:`torchrec_freq.rule`).

    Its main use is to be named, not stepped: TorchRec's sharded tables take it from
    ``apply_optimizer_in_backward`` and run the rule inside FBGEMM's backward.

    >>> from torch.distributed.optim import (
    ...     _apply_optimizer_in_backward as apply_optimizer_in_backward)
    >>> table = torch.nn.EmbeddingBag(10, 4, sparse=True)
    >>> apply_optimizer_in_backward(FrequencySGD, table.parameters(), {"lr": 0.05})

    ``step()`` applies the same rule to a parameter that is not sharded. A sparse gradient
    (``sparse=True`` of ``nn.EmbeddingBag`` and ``nn.Embedding``) lists every occurrence; a dense
    one does not, so it serves only ``count="frozen"``.

    Args:
        params: embedding tables, each [rows, columns], or parameter groups.
        lr: learning rate, at least 0. That of row-wise Adagrad is the place to start.
        options: ``prior_count``, ``half_life``, ``admit``, ``normalize``, ``count``, ``min_count``,
            ``eps``: see :class:`torchrec_freq.FrequencyConfig`.

    Raises:
        ValueError: a wrong value, named with what to give instead.

    Source:
        Li et al., "Frequency-aware SGD for Efficient Embedding Learning with Provable Benefits",
        ICLR 2022 (``normalize=None``).
    """

    def __init__(self, params: Iterable[Any], lr: float, **options: Unpack[Options]) -> None:
        config = make_config(options)
        defaults = {"lr": check_learning_rate(lr), **dataclasses.asdict(config)}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_learning_rate(group["lr"])
            make_config(
                {k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
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
            config = FrequencyConfig(**{name: group[name] for name in FIELDS})
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, config, group["lr"])
        return loss

    def _step(self, param: Tensor, grad: Tensor, config: FrequencyConfig, lr: float) -> None:
        state, device = self.state[param], param.device
        totals = TableTotals([config], device)
        if not state:
            state[MOMENTUM] = torch.zeros(len(param), device=device, dtype=torch.float32)
            state[ROW_COUNTER] = torch.zeros(len(param), dtype=torch.int32, device=device)
            state[TABLE_TOTALS] = totals.values[0].clone()
            state[ROW_COUNTER_AGE] = totals.ages.clone()
        rows_U, occurrences_U, grad_UD = _distinct_rows(grad, config)
        if len(rows_U) == 0:
            # torch.distributed.checkpoint makes such a step to have a state to load into.
            return
        counts_R, sums_R = state[ROW_COUNTER], state[MOMENTUM]
        if config.count == "frozen" and not counts_R.any():
            raise RuntimeError("count='frozen', but the optimizer's state has no counts: load one.")
        totals.values[0] = state[TABLE_TOTALS]
        totals.ages.copy_(state[ROW_COUNTER_AGE])

        step = dense_step(
            config,
            totals,
            0,
            counts_R.index_select(0, rows_U),
            sums_R.index_select(0, rows_U),
            occurrences_U,
            grad_UD,
        )
        scaled_UD = (grad_UD * step.multiplier_R.unsqueeze(1)).to(param.dtype)
        param.index_add_(0, rows_U, scaled_UD, alpha=-lr)
        counts_R.index_copy_(0, rows_U, step.counts_R)
        sums_R.index_copy_(0, rows_U, step.sums_R)
        totals.listen(lambda _: counts_R.bitwise_right_shift_(1), lambda: None)
        totals.listen(lambda _: sums_R.mul_(0.5), lambda: None)
        totals.end_step()
        state[TABLE_TOTALS].copy_(totals.values[0])
        state[ROW_COUNTER_AGE].copy_(totals.ages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, of version 0.2, or of row-wise Adagrad's ``momentum1``.

        See :meth:`torch.optim.Optimizer.load_state_dict`.

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
                self.state[param] = _completed(states[key], param)


def _completed(state: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
    """A copy of a saved state for a parameter, with what it lacks."""
    rows = len(param)
    table = TableState(
        counts=state.get(ROW_COUNTER, torch.zeros(rows, dtype=torch.int32)).cpu(),
        sums=state.get(MOMENTUM, torch.zeros(rows)).to("cpu", torch.float32).view(rows, 1),
        totals=state.get(TABLE_TOTALS, totals_of(0, 0)).cpu(),
        age=int(state.get(ROW_COUNTER_AGE, 0)),
    )
    if ROW_COUNTER not in state:
        table = with_counts_of_sums(table)
    elif int(table.totals[0]) == OLD_FORMAT:
        table = with_sums_of_counts(table)
    return {
        MOMENTUM: table.sums[:, 0].to(param.device, copy=True),
        ROW_COUNTER: table.counts.to(param.device, torch.int32, copy=True),
        TABLE_TOTALS: table.totals.to(param.device, copy=True),
        ROW_COUNTER_AGE: torch.tensor([table.age]),
    }


def _distinct_rows(grad: Tensor, config: FrequencyConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a gradient, how often each occurred, and its gradient.

    Raises:
        RuntimeError: the gradient does not show how often rows occurred.
    """
    if not grad.is_sparse:
        rows_U = grad.any(dim=1).nonzero().squeeze(1)
        if config.count == "samples" and len(rows_U):
            raise RuntimeError(
                "a dense gradient shows which rows occurred, not how often. Build the table "
                "with sparse=True, or shard it with TorchRec."
            )
        return rows_U, torch.ones_like(rows_U, dtype=torch.int32), grad.index_select(0, rows_U)
    # torch calls a gradient of one lookup coalesced, too: it is taken for one.
    if grad.is_coalesced() and config.count == "samples" and grad._nnz() > 1:
        raise RuntimeError(
            "the sparse gradient is coalesced, which loses how often each row occurred. Do not "
            "coalesce or clip it before step()."
        )
    rows_L, grad_LD = grad._indices()[0], grad._values()
    rows_U, inverse_L = rows_L.unique(return_inverse=True)
    occurrences_U = torch.zeros_like(rows_U, dtype=torch.int32)
    occurrences_U.scatter_add_(0, inverse_L, torch.ones_like(inverse_L, dtype=torch.int32))
    grad_UD = grad_LD.new_zeros(len(rows_U), grad_LD.shape[1])
    return rows_U, occurrences_U, grad_UD.index_add_(0, inverse_L, grad_LD)
