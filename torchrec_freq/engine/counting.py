"""What our table-batched embeddings have in common: counts, totals, how a batch changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import COUNT_CEILING
from torchrec_freq.engine.counters import count_occurrences_, halve_
from torchrec_freq.engine.loans import Loan
from torchrec_freq.engine.lookups import Batch, Layout, Lookups
from torchrec_freq.engine.totals import TableTotals, TotalsTable
from torchrec_freq.engine.turn import Turn

NOT_COMPILED: Final = "FrequencySGD works by autograd hooks, which a compiled graph would not run"
"""Why torch.compile stays out of the lookups; a message of its own where it is told to go in."""


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
        self._unchecked = frequency.count == "frozen"
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
        self._position_F: Tensor | None = None  # None: each its own
        if positions != list(range(totals.tables)):
            self._position_F = torch.tensor(positions, dtype=torch.int64, device=device)
        self.layout.split([member.column_share < 1 for member in members])
        shares = [(member.column_share, float(member.primary)) for member in members]
        self._column_share_F, self._primary_F = torch.tensor(
            shares, dtype=torch.float64, device=device
        ).unbind(1)
        self._aged = [member.position for member in tables if member.first]
        self._partial: list[Loan] = []
        totals.listen(self._on_step)

    def memory_of(self, table: int) -> Tensor:
        """int32 [rows] view of the counts of a table, which a backward may have lent."""
        return self._table(self.counts, table)

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

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As FBGEMM's; where a gradient is recorded, its backward counts and updates."""
        if torch.is_grad_enabled() and self._owns_totals:
            self.totals.advance()
            if self._unchecked:
                for table, count in enumerate(self.totals.values.select(1, 2).tolist()):
                    require_counts(self.frequency, str(table), count)
                self._unchecked = False
        weights_L, pooling = per_sample_weights, self.pooling_mode
        if weights_L is not None and not weights_L.is_cuda and pooling == PoolingMode.MEAN:
            # FBGEMM's CPU backward ignores 1/length where weights are given: they do the pooling.
            weights_L = mean_pooling_weights(offsets, weights_L)
            self.pooling_mode = PoolingMode.SUM
        try:
            output: Tensor = super().forward(  # type: ignore[misc]
                indices, offsets, weights_L, *args, **kwargs
            )
        finally:
            self.pooling_mode = pooling
        if output.grad_fn is not None:
            weights_L = None if weights_L is None else weights_L.detach()
            self._watch(output.grad_fn, Batch(indices, offsets, weights_L))
        return output

    def _watch(self, node: Any, batch: Batch) -> None:
        """Hooks what a backward has to do onto the autograd node of a forward."""
        raise NotImplementedError

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
        counts_L = self.counts.index_select(0, rows_L)
        self.counts.scatter_(0, rows_L, counts_L.clamp_(max=COUNT_CEILING))

    def _of_features(self, values_T: Tensor) -> Tensor:
        """[features] of [tables of the totals]: that of each feature's table."""
        if self._position_F is None:
            return values_T
        return values_T.index_select(0, self._position_F)

    def _add_totals(self, lookups: Lookups, entering_L: Tensor, occurrences_L: Tensor) -> None:
        """Adds a backward's squares and occurrences to the totals.

        Args:
            entering_L: float32 [lookups] what each adds to the sum of squares.
            occurrences_L: [lookups] trained occurrences of the row.
        """
        spans = lookups.spans
        occurrences_F = spans.lengths_F
        if lookups.trained_L is not None:
            occurrences_F = spans.sum(lookups.trained_L)
        squares_F = spans.sum(entering_L)
        if self.frequency.count == "samples":
            counts_F = occurrences_F
        elif self.frequency.count == "frozen":
            counts_F = torch.zeros_like(occurrences_F)
        else:
            once_L = 1.0 / occurrences_L.clamp(min=1)
            if lookups.trained_L is not None:
                once_L *= lookups.trained_L
            counts_F = spans.sum(once_L)
        touched_F = lookups.touched_F
        if self.layout.split_F is not None:
            # Whether a feature has a gradient in any column, those who add them up will know.
            occurrences_F = torch.where(self.layout.split_F, spans.lengths_F, occurrences_F)
            if self.frequency.count == "samples":
                counts_F = occurrences_F
            touched_F = occurrences_F if touched_F is None else touched_F
            squares_F = squares_F * self._column_share_F
            counts_F = counts_F * self._primary_F
            occurrences_F = occurrences_F * self._primary_F
        self.totals.add(self._slot_F, squares_F, counts_F, occurrences_F, touched_F)


def only_lr_and_eps(params: Mapping[str, float]) -> None:
    """Refuses hyperparameters that FBGEMM can change and the rule does not have."""
    if foreign := params.keys() - {"lr", "eps"}:
        raise ValueError(f"FrequencySGD has no {', '.join(sorted(foreign))}: only lr and eps.")


def mean_pooling_weights(offsets: Tensor, weights_L: Tensor) -> Tensor:
    """Weights that turn sum pooling into mean pooling: ``weights / length of the bag``.

    Returns:
        float32 [lookups].
    """
    lengths_B = offsets.diff()
    inverse_B = lengths_B.clamp(min=1).to(torch.float32).reciprocal_()
    return weights_L * torch.repeat_interleave(inverse_B, lengths_B, output_size=len(weights_L))


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
