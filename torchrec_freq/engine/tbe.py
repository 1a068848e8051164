"""The engine: counters lent to FBGEMM's row-wise Adagrad as its sums of squares.

FBGEMM's kernel keeps one float a row, ``momentum1``, adds ``mean(g^2)`` of the step to it, and
divides lr by its root. Between steps the memory of that float holds our int32 count of the row. In
a backward, on the autograd node of the lookup:

1. before the kernel (:meth:`FrequencyTBE._lend`): the batch's rows are counted, and what the rule
   predicts for each is written where the kernel will look for its sum of squares;
2. the kernel updates the weights by it, and adds the square of each row's gradient;
3. after the kernel (:meth:`FrequencyTBE._settle`): what it added goes to the tables' totals, and
   the counts are written back.

A kernel that fails leaves the loan open; whoever comes next closes it, which brings back the counts
of before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DoesNotHavePrefix,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.engine.counters import count_occurrences_
from torchrec_freq.engine.counting import CountingTBE, only_lr_and_eps
from torchrec_freq.engine.fused import fused
from torchrec_freq.engine.loans import Loan, entering, lent
from torchrec_freq.engine.lookups import Batch
from torchrec_freq.rule import kernel_factor

_MOMENTUM: Final = ("momentum1_dev", "momentum1_host")


class FrequencyTBE(CountingTBE, SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's table-batched embedding with the frequency-aware update in its backward.

    Takes the arguments of ``SplitTableBatchedEmbeddingBagsCodegen`` except ``optimizer`` and
    ``eps``.

    Args:
        frequency: the rule's settings.

    Raises:
        ValueError: an FBGEMM option that the rule would silently ignore.
    """

    def __init__(self, *args: Any, frequency: FrequencyConfig, **kwargs: Any) -> None:
        super().__init__(*args, **stock_options(frequency), **kwargs)
        self._lend_memory(frequency)

    @classmethod
    def adopt(
        cls, tbe: SplitTableBatchedEmbeddingBagsCodegen, frequency: FrequencyConfig
    ) -> FrequencyTBE:
        """Turns a stock TBE, made by somebody else with :func:`stock_options`, into this class."""
        if type(tbe) is not SplitTableBatchedEmbeddingBagsCodegen:
            raise TypeError(f"cannot adopt a {type(tbe).__name__}: the engine knows only FBGEMM's")
        tbe.__class__ = cls
        assert isinstance(tbe, cls)
        tbe._lend_memory(frequency)
        return tbe

    def _lend_memory(self, frequency: FrequencyConfig) -> None:
        if self.optimizer != EmbOptimType.EXACT_ROWWISE_ADAGRAD:
            raise ValueError(f"the engine runs on EXACT_ROWWISE_ADAGRAD, not on {self.optimizer}")
        if self.optimizer_args.gradient_clipping:
            raise ValueError(
                "gradient_clipping=True: FBGEMM's CPU kernel ignores it, so the rule would depend "
                "on the device; set it to False"
            )
        self._loan: Loan | None = None
        self._factor = kernel_factor(frequency)
        self._start(frequency, self.feature_table_map, self.current_device)
        self.counts.zero_()
        self._set_learning_rate(self.learning_rate_tensor.item())

    @property
    def _momentum(self) -> Tensor:
        """float32 [rows]. Anew each time: modules move their storage; ``.data``: past autograd."""
        name = _MOMENTUM[1] if self.momentum1_host.numel() else _MOMENTUM[0]
        momentum: Tensor = getattr(self, name)
        return momentum.data

    @property
    def counts(self) -> Tensor:
        """int32 [rows of all tables]: the memory of the kernel's sums of squares."""
        return self._momentum.view(torch.int32)

    def _watch(self, node: Any, batch: Batch) -> None:
        # Bounds-checked by the stock forward, and overwritten by the next one.
        batch.indices, batch.offsets = self._indices, self._offsets
        batch.bag_starts_F = self._vbe_B_offsets
        node.register_prehook(lambda grads: self._lend(batch, grads[0]))
        node.register_hook(lambda *_: self._settle())

    @torch.no_grad()
    def _lend(self, batch: Batch, grad: Tensor | None) -> None:
        """Counts a batch, and writes what the rule predicts where the kernel reads."""
        with self._turn:
            if self._loan is not None and self._loan.thread != threading.get_ident():
                raise RuntimeError(
                    "A backward of these tables is under way in another thread, or has failed "
                    "there: their memory is lent to one at a time. Train them in one thread."
                )
            self._close_loan()
            per_count_T, _ = self.totals.rates()
            lookups = self.layout.of(batch, grad)
            counts_R, rows_L = self.counts, lookups.rows_L
            before_L = counts_R.index_select(0, rows_L)
            self._loan = loan = Loan(lookups, before_L)
            count_occurrences_(counts_R, rows_L, lookups.trained_L)
            loan.after_L, loan.occurrences_L, loan.lent_L = fused(lent)(
                *(self.frequency, counts_R, rows_L, lookups.feature_L, before_L),
                self._of_features(per_count_T),
            )
            # Equal rows write equal values, so the order of the writes does not matter.
            self._momentum.scatter_(0, rows_L, loan.lent_L)

    @torch.no_grad()
    def _settle(self) -> None:
        """Takes what the kernel added to the totals, and writes the counts back."""
        with self._turn:
            loan = self._loan
            if loan is None:  # closed by somebody in between
                return
            assert loan.lent_L is not None
            assert loan.after_L is not None and loan.occurrences_L is not None
            counts_R, lookups = self.counts, loan.lookups
            _, limit_T = self.totals.rates()
            entering_L = fused(entering)(
                self.frequency,
                counts_R,
                *(lookups.rows_L, lookups.feature_L, lookups.trained_L),
                *(loan.occurrences_L, loan.lent_L),
                self._of_features(limit_T),
            )
            counts_R.scatter_(0, lookups.rows_L, loan.after_L)
            self._loan = None
            self._add_totals(lookups, entering_L, loan.occurrences_L)
            if lookups.touched_F is not None:
                self._partial.append(loan)
            self.totals.end_backward(self._aged)

    def _close_loan(self) -> None:
        with self._turn:
            loan, self._loan = self._loan, None
            if loan is not None:
                self.counts.scatter_(0, loan.lookups.rows_L, loan.before_L)

    def settled_counts(self, table: int) -> Tensor:
        """int32 [rows] copy of the counts of a table, also while a backward is under way."""
        with self._turn:
            if self._loan is None:
                return super().settled_counts(table)
            counts_R = self.counts.clone()
            counts_R.scatter_(0, self._loan.lookups.rows_L, self._loan.before_L)
            return self._table(counts_R, table)

    def _set_learning_rate(self, lr: float) -> float:
        """The rate of the next forward; the kernel's is larger by a constant of the rule."""
        self._learning_rate = float(lr)
        result: float = super()._set_learning_rate(lr * self._factor)
        return result

    def get_learning_rate(self) -> float:
        """The rate of the next forward."""
        return self._learning_rate

    def update_hyper_parameters(self, params_dict: dict[str, float]) -> None:
        """As FBGEMM's, for lr and eps.

        Raises:
            ValueError: another parameter, which the rule would ignore.
        """
        only_lr_and_eps(params_dict)
        scaled = {k: v * self._factor if k == "eps" else v for k, v in params_dict.items()}
        super().update_hyper_parameters(scaled)

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """[tables][1] int32 [rows]: copies of the counts."""
        return [[self.settled_counts(table)] for table in range(len(self.embedding_specs))]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Empty: TorchRec takes the counts from elsewhere."""
        return []

    def get_states(self, prefix: str) -> Any:
        """As FBGEMM's, of the weights."""
        if prefix == "momentum1":
            raise DoesNotHavePrefix()
        return super().get_states(prefix)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._close_loan()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in (prefix + name for name in _MOMENTUM if prefix + name in destination):
            destination[key] = destination[key].detach().view(torch.int32)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._close_loan()
        keys = {prefix + name for name in _MOMENTUM}
        counts = {k: v.view(torch.float32) for k, v in state_dict.items() if k in keys}
        super()._load_from_state_dict({**state_dict, **counts}, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves or casts the module: the counts move, and stay whole numbers."""
        self._close_loan()
        counts_R = self.counts.clone()
        super()._apply(fn, recurse)
        moved = self._momentum
        if moved.dtype != torch.float32:
            name = _MOMENTUM[1] if self.momentum1_host.numel() else _MOMENTUM[0]
            getattr(self, name).data = torch.empty_like(moved, dtype=torch.float32)
        if not counts_R.is_meta:
            self.counts.copy_(counts_R)
        return self

    def reset_embedding_weight_momentum(
        self,
        pruned_indices: Tensor,
        pruned_indices_offsets: Tensor,
        logical_table_ids: Tensor,
        buffer_ids: Tensor,
    ) -> None:
        """Forgets rows that now stand for other ids, as FBGEMM does for its own optimizer states.

        Args:
            pruned_indices: rows within their tables, in parts.
            pruned_indices_offsets: [parts + 1] where the parts begin.
            logical_table_ids: a feature of each table that has evictions.
            buffer_ids: the part of each.
        """
        with self._turn:
            self._close_loan()
            if not self.use_cpu:  # FBGEMM has it on GPUs only
                super().reset_embedding_weight_momentum(
                    pruned_indices, pruned_indices_offsets, logical_table_ids, buffer_ids
                )
            bounds = pruned_indices_offsets.tolist()
            for feature, part in zip(logical_table_ids.tolist(), buffer_ids.tolist(), strict=True):
                evicted = pruned_indices[bounds[part] : bounds[part + 1]].to(self.current_device)
                rows = evicted.to(torch.int64) + self.layout.first_row_F[feature]
                self.counts.index_fill_(0, rows, 0)


def stock_options(frequency: FrequencyConfig) -> dict[str, Any]:
    """Arguments of FBGEMM's TBE that make one to be adopted."""
    return {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "eps": frequency.eps * kernel_factor(frequency),
    }
