"""What our table-batched embeddings have in common: counts, totals, and the hooks of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import COUNT_CEILING
from torchrec_freq.engine.lookups import Features
from torchrec_freq.engine.totals import TableTotals
from torchrec_freq.rule import prior_squares

NOT_COMPILED: Final = "FrequencySGD works by autograd hooks, which a compiled graph would not run"
"""Why torch.compile stays out of the lookups; a message of its own where it is told to go in."""


@dataclass(frozen=True)
class Membership:
    """A table of a TBE among the tables of its :class:`TableTotals`.

    Attributes:
        position: number of the table there.
        column_share: columns of the shard over those of the table.
        primary: of shards that hold other columns of the same rows, one is: it adds the counts.
    """

    position: int
    column_share: float = 1.0
    primary: bool = True


class CountingTBE:
    """What our TBEs add to FBGEMM's, fused or dense.

    Attributes:
        frequency: the rule's settings, the same for all tables.
        features: which table each looks up.
        counts: int32 [rows of all tables].
        totals: of the tables; shared by all shards of a sharded module (:meth:`join`).
    """

    frequency: FrequencyConfig
    features: Features
    counts: Tensor
    totals: TableTotals
    embedding_specs: list[Any]
    pooling_mode: PoolingMode

    def _start(
        self, frequency: FrequencyConfig, feature_table_map: list[int], device: torch.device
    ) -> None:
        self.frequency = frequency
        rows = [spec[0] for spec in self.embedding_specs]
        self.features = Features(rows, feature_table_map, device)
        self.counts = torch.zeros(sum(rows), dtype=torch.int32, device=device)
        self._has_counts = frequency.count != "frozen"
        tables = range(len(rows))
        self.join(TableTotals([frequency for _ in tables], device), list(map(Membership, tables)))

    def join(self, totals: TableTotals, members: Sequence[Membership]) -> None:
        """Adds to ``totals`` from now on.

        Args:
            members: one for each of the TBE's tables.
        """
        self.totals, self._members = totals, list(members)
        of_features = [members[table] for table in self.features.tables]
        device = self.counts.device
        positions = [member.position for member in of_features]
        self._position_F = torch.tensor(positions, device=device)
        shares = [(member.column_share, float(member.primary)) for member in of_features]
        self._shares_F2 = torch.tensor(shares, dtype=torch.float64, device=device)
        self._prior: tuple[Tensor, Tensor] | None = None
        totals.listen(self._halve, self._clamp)

    def rows_of(self, table: int, values_R: Tensor) -> Tensor:
        """[rows] view of those of a table, of what has a value for each row of the TBE."""
        return values_R.narrow(0, self.features.first_rows[table], self.embedding_specs[table][0])

    @property
    def sums(self) -> Tensor:
        """float32 [rows of all tables]: row-wise Adagrad's sums of squares."""
        raise NotImplementedError

    def prior_F(self) -> Tensor:
        """float32 [features]: :func:`torchrec_freq.rule.prior_squares` of each one's table."""
        rho_T = self.totals.rho()
        if self._prior is None or self._prior[0] is not rho_T:
            rho_F = rho_T.index_select(0, self._position_F)
            self._prior = rho_T, prior_squares(self.frequency, rho_F)
        return self._prior[1]

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As FBGEMM's; where a gradient is recorded, its backward counts and updates.

        Raises:
            RuntimeError: the counts are frozen and none were loaded.
        """
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
        # Here: outside, a pipeline may have wrapped FBGEMM's node.
        node: Any = output.grad_fn
        if node is not None:
            self._require_counts()
            self._watch(node, indices, offsets)
        return output

    def _watch(self, node: Any, indices: Tensor, offsets: Tensor) -> None:
        """Hooks what a backward has to do onto the autograd node of a forward."""
        raise NotImplementedError

    def _require_counts(self) -> None:
        if not self._has_counts:
            if not bool(self.counts.any()):
                raise RuntimeError(
                    "count='frozen', but these tables have no counts: call "
                    "torchrec_freq.load_row_counts(model, counts) before training."
                )
            self._has_counts = True

    def _clamp(self) -> None:
        self.counts.clamp_(max=COUNT_CEILING)

    def _halve(self, position: int) -> None:
        for table, member in enumerate(self._members):
            if member.position == position:
                self.rows_of(table, self.counts).bitwise_right_shift_(1)
                self.rows_of(table, self.sums).mul_(0.5)


def mean_pooling_weights(offsets: Tensor, weights_L: Tensor) -> Tensor:
    """float32 [lookups]: ``weights / length of the bag``, which turn sum pooling into mean."""
    lengths_B = offsets.diff()
    inverse_B = lengths_B.clamp(min=1).to(torch.float32).reciprocal_()
    return weights_L * torch.repeat_interleave(inverse_B, lengths_B, output_size=len(weights_L))
