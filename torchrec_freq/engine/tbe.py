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

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DoesNotHavePrefix,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.engine.counters import count_occurrences_, counted, halve_
from torchrec_freq.engine.lookups import Batch, Layout, Lookups
from torchrec_freq.engine.totals import TableTotals, TotalsTable
from torchrec_freq.engine.turn import Turn
from torchrec_freq.rule import entering_squares, kernel_factor, lent_squares

NOT_COMPILED: Final = "FrequencySGD works by autograd hooks, which a compiled graph would not run"
"""Why torch.compile stays out of the lookups; a message of its own where it is told to go in."""

_MOMENTUM: Final = ("momentum1_dev", "momentum1_host")


def mean_pooling_weights(offsets: Tensor, weights_L: Tensor) -> Tensor:
    """Weights that turn sum pooling into mean pooling: ``weights / length of the bag``.

    Returns:
        float32 [lookups].
    """
    lengths_B = offsets.diff()
    inverse_B = lengths_B.clamp(min=1).to(torch.float32).reciprocal_()
    return weights_L * torch.repeat_interleave(inverse_B, lengths_B, output_size=len(weights_L))


@dataclass
class Loan:
    """What the sums of squares of a batch's rows were before they were lent, and what was lent.

    Attributes:
        before_L: int32 [lookups] the counts.
        after_L: int32 [lookups] the counts once the step is done.
        occurrences_L: int32 [lookups] trained occurrences of the row in the batch.
        lent_L: float32 [lookups]; None until it is.
    """

    lookups: Lookups
    before_L: Tensor
    after_L: Tensor | None = None
    occurrences_L: Tensor | None = None
    lent_L: Tensor | None = None


@dataclass(frozen=True)
class Membership:
    """A table of a TBE among the tables of its :class:`TableTotals`.

    Attributes:
        position: number of the table there.
        column_share: columns of the shard over those of the table.
        primary: of shards that hold other columns of the same rows, one is: it adds the counts.
        first: whether it is the rank's first shard of the table, which tells the table's age.
    """

    position: int
    column_share: float = 1.0
    primary: bool = True
    first: bool = True


class CountingTBE:
    """What our TBEs add to FBGEMM's, fused or dense: counts, totals, and how they change.

    Attributes:
        frequency: the rule's settings, the same for all tables.
        layout: of the features.
        totals: of the tables; shared by all shards of a sharded module (:meth:`join`).
    """

    frequency: FrequencyConfig
    layout: Layout
    totals: TableTotals
    embedding_specs: list[Any]
    pooling_mode: PoolingMode

    @property
    def counts(self) -> Tensor:
        """int32 [rows of all tables]: the memory itself."""
        raise NotImplementedError

    def _start(
        self, frequency: FrequencyConfig, feature_table_map: list[int], device: torch.device
    ) -> None:
        self.frequency = frequency
        self._turn = Turn()
        self.layout = Layout(
            [spec[0] for spec in self.embedding_specs],
            [spec[1] for spec in self.embedding_specs],
            feature_table_map,
            pooled=self.pooling_mode != PoolingMode.NONE,
            device=device,
        )
        tables = range(len(self.embedding_specs))
        own = [TotalsTable(feature_table_map.count(table), frequency) for table in tables]
        self.join(TableTotals(own, device), [Membership(table) for table in tables])
        self._owns_totals = True

    def join(self, totals: TableTotals, tables: Sequence[Membership]) -> None:
        """Adds to ``totals`` from now on, which somebody else advances.

        Args:
            tables: one for each of the TBE's tables.
        """
        self.totals = totals
        self._owns_totals = False
        self._members = list(tables)
        features = self.layout.feature_table_map
        members = [tables[table] for table in features]
        nth = [features[:index].count(table) for index, table in enumerate(features)]
        slots = [totals.slots(m.position)[n] for m, n in zip(members, nth, strict=True)]
        device = self.layout.first_row_F.device
        self._slot_F = torch.tensor(slots, dtype=torch.int64, device=device)
        positions = [member.position for member in members]
        self._position_F = torch.tensor(positions, dtype=torch.int64, device=device)
        self.layout.split([member.column_share < 1 for member in members])
        shares = [(member.column_share, float(member.primary)) for member in members]
        self._column_share_F, self._primary_F = torch.tensor(
            shares, dtype=torch.float64, device=device
        ).unbind(1)
        self._aged = [member.position for member in tables if member.first]
        self._partial: list[Loan] = []
        totals.listen(self._on_step)

    def counts_of(self, table: int) -> Tensor:
        """int32 [rows] view of the counts of a table, which may be written until the next step."""
        with self._turn:
            self._close_loan()
            return self._table(self.counts, table)

    def settled_counts(self, table: int) -> Tensor:
        """int32 [rows] copy of the counts of a table, also while a backward is under way."""
        with self._turn:
            return self._table(self.counts, table).clone()

    def _table(self, counts_R: Tensor, table: int) -> Tensor:
        rows = [spec[0] for spec in self.embedding_specs]
        return counts_R.narrow(0, sum(rows[:table]), rows[table])

    def _close_loan(self) -> None:
        """Brings back the counts that a failed kernel has left lent."""

    def _begin_forward(self) -> None:
        """Starts a step, where a gradient is recorded and nobody else does."""
        if torch.is_grad_enabled() and self._owns_totals:
            self.totals.advance()
            if self.frequency.count == "frozen":
                for table, count in enumerate(self.totals.values.select(1, 2).tolist()):
                    require_counts(self.frequency, str(table), count)

    @contextlib.contextmanager
    def _pooled_by_weights(self, offsets: Tensor, weights_L: Tensor | None) -> Iterator[Any]:
        """The weights to hand to the stock forward, and its pooling mode while it runs.

        FBGEMM's CPU backward ignores 1/length where weights are given, so there the weights pool.
        """
        pooling = self.pooling_mode
        if weights_L is not None and not weights_L.is_cuda and pooling == PoolingMode.MEAN:
            weights_L = mean_pooling_weights(offsets, weights_L)
            self.pooling_mode = PoolingMode.SUM
        try:
            yield weights_L
        finally:
            self.pooling_mode = pooling

    def _on_step(self, untouched_S: Tensor | None, due: Sequence[int]) -> None:
        """Counts what had a gradient in other columns alone, and ages; see ``TableTotals``."""
        with self._turn:
            for loan in self._partial:
                assert untouched_S is not None and self.layout.split_F is not None
                assert loan.lookups.touched_F is not None
                elsewhere_F = untouched_S.index_select(0, self._slot_F).logical_not()
                missed_F = elsewhere_F & self.layout.split_F & (loan.lookups.touched_F == 0)
                self._add_missed(loan, missed_F.index_select(0, loan.lookups.feature_L))
            self._partial.clear()
            for table, member in enumerate(self._members):
                if member.position in due:
                    halve_(self.counts_of(table))

    def _add_missed(self, loan: Loan, missed_L: Tensor) -> None:
        rows_L = loan.lookups.rows_L
        if self.frequency.count == "frozen":
            return
        before_L = self.counts.index_select(0, rows_L)
        count_occurrences_(self.counts, rows_L, missed_L.to(torch.int32))
        if self.frequency.count == "batches":  # once a row, and not where it was counted already
            assert loan.after_L is not None
            added_L = (self.counts.index_select(0, rows_L) - before_L).clamp_(max=1)
            added_L = (added_L - (loan.after_L - loan.before_L)).clamp_(min=0)
            self.counts.scatter_(0, rows_L, before_L + added_L)

    def _add_totals(
        self, lookups: Lookups, squares_L: Tensor, occurrences_L: Tensor, limit_T: Tensor
    ) -> None:
        """Adds a backward's squares and occurrences to the totals.

        Args:
            squares_L: float32 [lookups] mean square of the gradient of each lookup's row.
            occurrences_L: [lookups] trained occurrences of the row.
            limit_T: as :meth:`TableTotals.rates` gives it.
        """
        ends_F = lookups.ends_F
        limit_L = limit_T.index_select(0, self._position_F).index_select(0, lookups.feature_L)
        entering_L = entering_squares(squares_L, occurrences_L, limit_L)
        if lookups.trained_L is None:
            occurrences_F = lookups.lengths_F
        else:
            trained_L = lookups.trained_L.to(torch.float32)
            entering_L *= trained_L
            occurrences_F = torch.ops.fbgemm.segment_sum_csr(1, ends_F, trained_L)
        squares_F = torch.ops.fbgemm.segment_sum_csr(1, ends_F, entering_L)
        if self.frequency.count == "samples":
            counts_F = occurrences_F
        elif self.frequency.count == "frozen":
            counts_F = torch.zeros_like(occurrences_F)
        else:
            once_L = 1.0 / occurrences_L.clamp(min=1)
            if lookups.trained_L is not None:
                once_L *= lookups.trained_L
            counts_F = torch.ops.fbgemm.segment_sum_csr(1, ends_F, once_L)
        touched_F = lookups.touched_F
        if self.layout.split_F is not None:
            # Whether a feature has a gradient in any column, those who add them up will know.
            occurrences_F = torch.where(self.layout.split_F, lookups.lengths_F, occurrences_F)
            if self.frequency.count == "samples":
                counts_F = occurrences_F
            touched_F = occurrences_F if touched_F is None else touched_F
            squares_F = squares_F * self._column_share_F
            counts_F = counts_F * self._primary_F
            occurrences_F = occurrences_F * self._primary_F
        self.totals.add(self._slot_F, squares_F, counts_F, occurrences_F, touched_F)


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

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the stock forward; where a gradient is recorded, its backward counts and updates."""
        self._begin_forward()
        with self._pooled_by_weights(offsets, per_sample_weights) as weights_L:
            output: Tensor = super().forward(
                indices,
                offsets,
                weights_L,
                feature_requires_grad,
                batch_size_per_feature_per_rank,
                **kwargs,
            )
        node = output.grad_fn
        if node is not None:
            # Bounds-checked by the stock forward, and overwritten by the next one.
            weights_L = None if weights_L is None else weights_L.detach()
            batch = Batch(self._indices, self._offsets, weights_L, self._vbe_B_offsets)
            node.register_prehook(lambda grads: self._lend(batch, grads[0]))
            node.register_hook(lambda *_: self._settle())
        return output

    @torch.no_grad()
    def _lend(self, batch: Batch, grad: Tensor | None) -> None:
        """Counts a batch, and writes what the rule predicts where the kernel reads."""
        with self._turn:
            self._close_loan()
            per_count_T, _ = self.totals.rates()
            lookups = self.layout.of(batch, grad)
            counts_R, rows_L = self.counts, lookups.rows_L
            before_L = counts_R.index_select(0, rows_L)
            self._loan = loan = Loan(lookups, before_L)
            count_occurrences_(counts_R, rows_L, lookups.trained_L)
            now_L = counts_R.index_select(0, rows_L)
            loan.occurrences_L = now_L - before_L
            loan.after_L = counted(self.frequency.count, before_L, now_L)
            unit_L = None
            if self.frequency.normalize is not None:
                unit_T = per_count_T / self.frequency.own_weight
                unit_L = unit_T.index_select(0, self._position_F)
                unit_L = unit_L.index_select(0, lookups.feature_L)
            loan.lent_L = lent_squares(self.frequency, loan.after_L, unit_L)
            # Equal rows write equal values, so the order of the writes does not matter.
            self._momentum.scatter_(0, rows_L, loan.lent_L)

    @torch.no_grad()
    def _settle(self) -> None:
        """Takes what the kernel added to the totals, and writes the counts back."""
        with self._turn:
            loan, self._loan = self._loan, None
            if loan is None:  # closed by somebody in between
                return
            assert loan.lent_L is not None
            assert loan.after_L is not None and loan.occurrences_L is not None
            rows_L = loan.lookups.rows_L
            squares_L = self._momentum.index_select(0, rows_L).sub_(loan.lent_L)
            self.counts.scatter_(0, rows_L, loan.after_L)
            if self.frequency.normalize is None:
                squares_L.zero_()  # not seen beside what was lent
            _, limit_T = self.totals.rates()
            self._add_totals(loan.lookups, squares_L, loan.occurrences_L, limit_T)
            if loan.lookups.touched_F is not None:
                self._partial.append(loan)
            self.totals.end_backward(self._aged)

    def _close_loan(self) -> None:
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
        if foreign := params_dict.keys() - {"lr", "eps"}:
            raise ValueError(f"FrequencySGD has no {', '.join(sorted(foreign))}: only lr and eps.")
        scaled = {k: v * self._factor if k == "eps" else v for k, v in params_dict.items()}
        super().update_hyper_parameters(scaled)

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """[tables][1] int32 [rows]: copies of the counts."""
        return [[self.settled_counts(table)] for table in range(len(self.embedding_specs))]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Empty for each table, as of SGD: TorchRec takes the counts from elsewhere."""
        return [{} for _ in self.embedding_specs]

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


def require_counts(config: FrequencyConfig, table: str, count: float) -> None:
    """Refuses to train by frozen counts that are all 0.

    Args:
        count: sum of the table's counts.

    Raises:
        RuntimeError: no counts were loaded.
    """
    if config.count == "frozen" and not count > 0:
        raise RuntimeError(
            f"Table {table!r}: count='frozen' but no counts were loaded: call "
            "torchrec_freq.load_row_counts(model, counts) before training."
        )


def stock_options(frequency: FrequencyConfig) -> dict[str, Any]:
    """Arguments of FBGEMM's TBE that make one to be adopted."""
    return {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "eps": frequency.eps * kernel_factor(frequency),
    }
