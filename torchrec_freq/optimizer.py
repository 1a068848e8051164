"""FrequencySGD: the optimizer class that opts tables in, and the same rule for unsharded tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchrec_freq.config import FIELDS, FrequencyConfig, check_learning_rate, make_config
from torchrec_freq.counters import RowCounters
from torchrec_freq.rule import row_multiplier
from torchrec_freq.scale import TableScales
from torchrec_freq.tables import ROW_COUNTER, ROW_COUNTER_STEPS, TABLE_SCALE


class FrequencySGD(torch.optim.Optimizer):
    r"""SGD for embedding tables with a learning rate a row that falls with the row's frequency.

    .. math::
        w_i \leftarrow w_i - \frac{\mathrm{lr}}{s_t \sqrt{\max(e_i, \mathrm{min\_count})}}\, g_i,
        \qquad e_i = c_i \left(1 + \mathrm{coherence} \cdot \frac{c_i}{n}\right)

    :math:`c_i` is the number of occurrences of row ``i`` so far, this step included, ``n`` the
    number of steps, :math:`g_i` the gradient of the mean loss of the global batch and :math:`s_t`
    the scale of the table's gradients (:class:`torchrec_freq.scale.TableScales`).

    Its main use is to be named, not stepped: TorchRec's sharded tables take it from
    ``apply_optimizer_in_backward`` and run the rule inside FBGEMM's backward.

    >>> from torch.distributed.optim import (
    ...     _apply_optimizer_in_backward as apply_optimizer_in_backward)
    >>> table = torch.nn.EmbeddingBag(10, 4, sparse=True)
    >>> apply_optimizer_in_backward(FrequencySGD, table.parameters(), {"lr": 0.05})

    ``step()`` applies the same rule to a parameter that is not sharded. It takes what it needs from
    the gradient: a sparse gradient (``sparse=True`` of ``nn.EmbeddingBag`` and ``nn.Embedding``)
    lists every occurrence; a dense one shows only which rows have a gradient, so it serves just
    ``count="batches"`` or ``"frozen"`` with ``normalize=None``.

    Args:
        params: embedding tables, each [rows, columns], or parameter groups.
        lr: learning rate, at least 0. That of row-wise Adagrad is the place to start.
        count, min_count, half_life, coherence, normalize: see
            :class:`torchrec_freq.config.FrequencyConfig`; keyword only.

    Raises:
        ValueError: an unknown keyword or a wrong value, named with what to give instead.

    Source:
        Li et al., "Frequency-aware SGD for Efficient Embedding Learning with Provable Benefits",
        ICLR 2022 (``coherence=0, min_count=1, normalize=None``).
    """

    def __init__(self, params: Iterable[Any], lr: float, **options: Any) -> None:
        defaults = dataclasses.asdict(make_config(options))
        super().__init__(params, {"lr": check_learning_rate(lr), **defaults})
        self._tables: dict[Tensor, _UnshardedTable] = {}
        for group in self.param_groups:
            check_learning_rate(group["lr"])
            _config(group)
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
                    self._step(param, param.grad, group)
        return loss

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        config = _config(group)
        if grad.is_sparse:
            if grad.is_coalesced() and grad._nnz() > 1 and config.count == "samples":
                raise RuntimeError(
                    "the sparse gradient was coalesced, which loses how often each row occurred. "
                    "Do not coalesce or clip it before step(), or use count='batches'."
                )
            rows_L, grad_LD = grad._indices()[0], grad._values()
        else:
            if not grad.any():
                # torch.distributed.checkpoint makes such a step to have a state to load into.
                self.state[param] = self._table(param).state()
                return
            if config.count == "samples":
                raise RuntimeError(
                    "a dense gradient shows which rows occurred, not how often. Build the table "
                    "with sparse=True, shard it with TorchRec, or use count='batches'."
                )
            if config.normalize is not None:
                raise RuntimeError(
                    "a dense gradient is summed over the lookups, which hides their scale. Build "
                    "the table with sparse=True, shard it with TorchRec, or use normalize=None."
                )
            rows_L = grad.any(dim=1).nonzero().squeeze(1)
            grad_LD = grad.index_select(0, rows_L)

        table = self._table(param)
        counters, scales = table.counters, table.scales
        counters.begin_step(config.count)
        counters.add(rows_L, config.count)
        inverse = None
        if config.normalize is not None:
            first = torch.zeros(1, dtype=torch.int64, device=param.device)
            measured = (first, grad_LD.square().sum().view(1), first + grad_LD.numel())
            scales.add_lookups(*measured)
            scales.add_outputs(*measured)
            inverse = scales.inverse()
            scales.end_step()
        multiplier_L = row_multiplier(
            config, counters.gather(rows_L), counters.device_steps, inverse
        )
        scaled_LD = grad_LD * multiplier_L.unsqueeze(1).to(grad_LD.dtype)
        param.index_add_(0, rows_L, scaled_LD, alpha=-group["lr"])
        counters.end_step(config.half_life)
        self.state[param] = table.state()

    def _table(self, param: Tensor) -> _UnshardedTable:
        if param not in self._tables:
            self._tables[param] = _UnshardedTable(param)
        return self._tables[param]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer.

        Raises:
            ValueError: the state of another optimizer, without row counters.
        """
        states = state_dict["state"]
        for key, state in states.items():
            if missing := {ROW_COUNTER, ROW_COUNTER_STEPS, TABLE_SCALE} - state.keys():
                raise ValueError(
                    f"The state of parameter {key} lacks {', '.join(sorted(missing))}: it is not "
                    "one of FrequencySGD. Start without it; the counts then begin at zero."
                )
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params, strict=True):
            if key in states:
                # The base class casts states to the type of the parameter.
                self._table(param).load(states[key])
                self.state[param] = self._table(param).state()


class _UnshardedTable:
    """Counters and scale of a whole table."""

    def __init__(self, param: Tensor) -> None:
        self.counters = RowCounters([param.shape[0]], param.device)
        self.scales = TableScales(1, param.device)

    def state(self) -> dict[str, Tensor]:
        return {
            ROW_COUNTER: self.counters.counts,
            ROW_COUNTER_STEPS: torch.from_numpy(self.counters.steps[0]),
            TABLE_SCALE: self.scales.totals[0],
        }

    def load(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state().items():
            value.copy_(state[key])


def _config(group: dict[str, Any]) -> FrequencyConfig:
    return make_config({name: group[name] for name in FIELDS})
