"""The engine: FBGEMM's row-wise Adagrad, told how much the table's prediction adds to each sum.

FBGEMM's kernel keeps a row's sum of squares in ``momentum1``, adds ``mean(g^2)`` of the step to it,
and divides lr by its root. Its memory holds the row's own sum, as in row-wise Adagrad; the counts
are a buffer beside it. In a backward, on the autograd node of the lookup:

1. before the kernel (:meth:`FrequencyTBE._predict`): the batch is counted, and what the rule adds
   to each row's own sum is added in ``momentum1``;
2. the kernel updates the weights by it, and adds the square of each row's gradient;
3. after the kernel (:meth:`FrequencyTBE._restore`): what the rule added is taken out again. In a
   sampled step the squares go to the table's totals.

A kernel that fails leaves the batch counted, and a mixture of two estimates as its rows' sums. A
reader in the middle of a backward sees the same. Neither does harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.engine.counting import CountingTBE
from torchrec_freq.engine.lookups import Lookups
from torchrec_freq.rule import kernel_counts, kernel_factor, prior_change

_MOMENTUM: Final = ("momentum1_dev", "momentum1_host")


@dataclass
class _Step:
    """A batch between the two hooks of its backward.

    Attributes:
        counts_L: the counts before the batch; None where nobody will ask.
        change_L: what was added to each row's sum; None where nothing was.
    """

    lookups: Lookups
    counts_L: Tensor | None = None
    own_L: Tensor | None = None
    change_L: Tensor | None = None


class FrequencyTBE(CountingTBE, SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's table-batched embedding with the frequency-aware update in its backward.

    Takes the arguments of ``SplitTableBatchedEmbeddingBagsCodegen`` except ``optimizer`` and
    ``eps``.

    Args:
        frequency: the rule's settings.

    Raises:
        ValueError: an FBGEMM option that the device's kernel would silently ignore.
    """

    def __init__(self, *args: Any, frequency: FrequencyConfig, **kwargs: Any) -> None:
        super().__init__(*args, **stock_options(frequency), **kwargs)
        self._begin(frequency)

    @classmethod
    def adopt(
        cls, tbe: SplitTableBatchedEmbeddingBagsCodegen, frequency: FrequencyConfig
    ) -> FrequencyTBE:
        """Turns a stock TBE, made by somebody else with :func:`stock_options`, into this class."""
        if type(tbe) is not SplitTableBatchedEmbeddingBagsCodegen:
            raise TypeError(f"cannot adopt a {type(tbe).__name__}: the engine knows only FBGEMM's")
        tbe.__class__ = cls
        assert isinstance(tbe, cls)
        tbe._begin(frequency)
        return tbe

    def _begin(self, frequency: FrequencyConfig) -> None:
        if self.optimizer != EmbOptimType.EXACT_ROWWISE_ADAGRAD:
            raise ValueError(f"the engine runs on EXACT_ROWWISE_ADAGRAD, not on {self.optimizer}")
        for name in ("gradient_clipping", "weight_decay"):
            if self.use_cpu and getattr(self.optimizer_args, name):
                raise ValueError(
                    f"{name}: FBGEMM's CPU kernel ignores it. Leave it out, or train on a GPU."
                )
        self._factor = kernel_factor(frequency)
        self.register_buffer("counts", None)
        one = torch.ones((), dtype=torch.int32, device=self.current_device)
        self.register_buffer("_one", one, persistent=False)
        self._start(frequency, self.feature_table_map, self.current_device)
        self._set_learning_rate(self.learning_rate_tensor.item())

    @property
    def sums(self) -> Tensor:
        """float32 [rows of all tables]: ``momentum1``."""
        # Each time: modules move its storage. ``.data``: autograd need not know.
        name = _MOMENTUM[1] if self.momentum1_host.numel() else _MOMENTUM[0]
        momentum: Tensor = getattr(self, name)
        return momentum.data

    def _watch(self, node: Any, indices: Tensor, offsets: Tensor) -> None:
        # Bounds-checked by the stock forward, which makes others in the next one.
        ids_L, offsets_B, bags_F = self._indices, self._offsets, self._vbe_B_offsets
        steps: list[_Step] = []
        node.register_prehook(lambda _: steps.append(self._predict(ids_L, offsets_B, bags_F)))
        node.register_hook(lambda *_: self._restore(steps.pop()))

    @torch.no_grad()
    def _predict(self, ids_L: Tensor, offsets_B: Tensor, bags_F: Tensor | None) -> _Step:
        """Counts a batch, and adds to its rows' sums what the rule predicts beside them."""
        self.totals.end_with_backward()
        config, counts_R, sums_R = self.frequency, self.counts, self.sums
        lookups = self.features.look_up(ids_L, offsets_B, bags_F)
        rows_L = lookups.rows_L
        step = _Step(lookups)
        if config.normalize is None:
            self._count(rows_L)
            accumulators_L = kernel_counts(config, counts_R.index_select(0, rows_L))
            sums_R.scatter_(0, rows_L, self._admitted(rows_L, accumulators_L))
            return step
        if config.prior_count == 0 and config.admit == 1:
            self._count(rows_L)
            return step
        step.counts_L = counts_R.index_select(0, rows_L)
        self._count(rows_L)
        step.own_L = sums_R.index_select(0, rows_L)
        step.change_L = prior_change(
            config,
            lookups.by_feature(step.counts_L),
            lookups.by_feature(step.own_L),
            lookups.spread(self.prior_F()),
        ).view(-1)
        # Equal rows write equal values, so the order of the writes does not matter.
        sums_R.scatter_(0, rows_L, self._admitted(rows_L, step.own_L + step.change_L))
        return step

    def _count(self, rows_L: Tensor) -> None:
        if self.frequency.count != "frozen":
            self.counts.scatter_add_(0, rows_L, self._one.expand_as(rows_L))

    def _admitted(self, rows_L: Tensor, sums_L: Tensor) -> Tensor:
        """The sums, infinite for rows that are not admitted: the kernel does not move them."""
        if self.frequency.admit == 1:
            return sums_L
        return sums_L.masked_fill_(self._waiting(rows_L), torch.inf)

    def _waiting(self, rows_L: Tensor) -> Tensor:
        """bool [lookups]: the row has not occurred often enough, this batch included."""
        return self.counts.index_select(0, rows_L) < self.frequency.admit

    @torch.no_grad()
    def _restore(self, step: _Step) -> None:
        """Takes what the rule added out of the sums; in a sampled step adds to the totals."""
        if step.change_L is None:
            return
        assert step.own_L is not None and step.counts_L is not None
        rows_L, sums_R = step.lookups.rows_L, self.sums
        sums_L = sums_R.index_select(0, rows_L).sub_(step.change_L)
        if self.frequency.admit > 1:
            sums_L = torch.where(self._waiting(rows_L), step.own_L, sums_L)
        sums_R.scatter_(0, rows_L, sums_L)
        if self.frequency.prior_count > 0 and self.totals.sampled():
            self._sample(step, sums_L.sub_(step.own_L))

    def _sample(self, step: _Step, squares_L: Tensor) -> None:
        """Adds the squares of a batch's rows, each once, and its occurrences to the totals."""
        lookups, counts_L = step.lookups, step.counts_L
        assert counts_L is not None
        after_L = self.counts.index_select(0, lookups.rows_L)
        squares_L.nan_to_num_(0.0, 0.0, 0.0).div_(after_L - counts_L)
        occurrences_F = lookups.lengths()
        if self.frequency.admit > 1:
            occurrences_F = lookups.sum((after_L >= self.frequency.admit).float())
        squares_F = lookups.sum(squares_L)
        self.totals.add(self._position_F, squares_F, occurrences_F, self._shares_F2)

    def _set_learning_rate(self, lr: float) -> float:
        """The rate of the next forward; the kernel's is larger by a constant of the rule."""
        self._learning_rate = float(lr)
        result: float = super()._set_learning_rate(lr * self._factor)
        return result

    def get_learning_rate(self) -> float:
        """The rate of the next forward."""
        return self._learning_rate

    def update_hyper_parameters(self, params_dict: dict[str, float]) -> None:
        """As FBGEMM's, for what the kernel honours.

        Raises:
            ValueError: another parameter, which would be ignored.
        """
        known = {"lr", "eps"} if self.use_cpu else {"lr", "eps", "weight_decay"}
        only(known, params_dict)
        scaled = {k: v * self._factor if k == "eps" else v for k, v in params_dict.items()}
        super().update_hyper_parameters(scaled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves or casts the module; sums stay float32, which the kernel wants, and exact."""
        exact = {name: getattr(self, name).data.clone() for name in _MOMENTUM}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = values.to(moved.device)
        return self

    def reset_embedding_weight_momentum(
        self,
        pruned_indices: Tensor,
        pruned_indices_offsets: Tensor,
        logical_table_ids: Tensor,
        buffer_ids: Tensor,
    ) -> None:
        """Forgets rows that now stand for other ids: their counts and sums, and on a GPU weights.

        Args:
            pruned_indices: rows within their tables, in parts.
            pruned_indices_offsets: [parts + 1] where the parts begin.
            logical_table_ids: a feature of each table that has evictions.
            buffer_ids: the part of each.
        """
        if not self.use_cpu:  # FBGEMM has it on GPUs only
            super().reset_embedding_weight_momentum(
                pruned_indices, pruned_indices_offsets, logical_table_ids, buffer_ids
            )
        bounds = pruned_indices_offsets.tolist()
        for feature, part in zip(logical_table_ids.tolist(), buffer_ids.tolist(), strict=True):
            evicted = pruned_indices[bounds[part] : bounds[part + 1]].to(self.current_device)
            rows = evicted.to(torch.int64) + self.features.first_row_F[feature]
            self.counts.index_fill_(0, rows, 0)
            self.sums.index_fill_(0, rows, 0.0)


def only(known: set[str], params: dict[str, float]) -> None:
    """Refuses hyperparameters that the rule does not have.

    Raises:
        ValueError: names them.
    """
    if foreign := params.keys() - known:
        raise ValueError(
            f"FrequencySGD has no {', '.join(sorted(foreign))} here: only "
            f"{', '.join(sorted(known))}."
        )


def stock_options(frequency: FrequencyConfig) -> dict[str, Any]:
    """Arguments of FBGEMM's TBE that make one to be adopted."""
    return {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "eps": frequency.eps * kernel_factor(frequency),
    }
