"""Data-parallel tables: the same rule where every rank holds the whole table.

TorchRec replicates such a table, has DDP average its dense gradient over the ranks, and drops the
optimizer that was named for it. Here a DDP communication hook applies the rule as soon as the
gradient is averaged, with counts that are summed over the ranks too: that sum starts in the
forward, so it overlaps with the rest of the step.

The update costs a pass over the table's rows, as the averaging of the dense gradient does.
"""

# No postponed annotations: DDP compares those of its communication hook with the types themselves.

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counters import count_occurrences_
from torchrec_freq.group import Batch
from torchrec_freq.rule import row_multiplier
from torchrec_freq.tbe import NOT_COMPILED, GroupedTBE, before_backward, variable_batch


class ReplicatedTBE(GroupedTBE, DenseTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's dense table-batched embedding, updated by the rule in DDP's backward.

    Its group is equal on every rank.
    """

    @classmethod
    def adopt(
        cls,
        tbe: DenseTableBatchedEmbeddingBagsCodegen,
        frequency: FrequencyConfig,
        feature_table_map: list[int],
        learning_rate: float,
        process_group: dist.ProcessGroup | None,
    ) -> "ReplicatedTBE":
        """Turns a stock dense TBE into this class in place."""
        if type(tbe) is not DenseTableBatchedEmbeddingBagsCodegen:
            raise TypeError(f"cannot adopt a {type(tbe).__name__}: the engine knows only FBGEMM's")
        tbe.__class__ = cls
        assert isinstance(tbe, cls)
        tbe._start_group(frequency, feature_table_map, tbe.weights.device)
        tbe._inverse_T = torch.zeros(len(tbe.embedding_specs), device=tbe.weights.device)
        tbe.learning_rate = learning_rate
        ranks = 1 if process_group is None else process_group.size()
        tbe._ranks = ranks
        tbe._process_group = process_group if ranks > 1 else None
        tbe.weights._replicated_tbe = tbe
        return tbe

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the next steps."""
        self.learning_rate = lr

    def get_learning_rate(self) -> float:
        """Learning rate of the next step, as FBGEMM's fused TBE gives its own."""
        return self.learning_rate

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
    ) -> Tensor:
        """As the stock forward; where a gradient is recorded, its backward counts."""
        weights_L = self._pooling_weights(indices, offsets, per_sample_weights)
        output: Tensor = super().forward(
            indices,
            offsets,
            weights_L,
            feature_requires_grad,
            batch_size_per_feature_per_rank,
        )
        if not output.requires_grad:
            return output
        batch = Batch(
            indices,
            offsets,
            None if weights_L is None else weights_L.detach().to(torch.float32),
            variable_batch(self._vbe_metadata, batch_size_per_feature_per_rank),
        )
        before_backward(output, _Update(self, batch).on_output_grad)
        return output

    @torch.no_grad()
    def apply(self, gradient: Tensor) -> None:
        """Updates the tables.

        Args:
            gradient: that of ``weights``, averaged over the ranks.
        """
        config, counters = self.group.config, self.group.counters
        for table, (rows, dim) in enumerate(self.embedding_specs):
            multiplier_R = row_multiplier(
                config,
                counters.saturated(table),
                counters.device_steps.narrow(0, table, 1),
                self._inverse_T.narrow(0, table, 1),
            )
            start = self.weights_physical_offsets[table]
            weight_RD = self.weights.narrow(0, start, rows * dim).view(rows, dim)
            gradient_RD = gradient.narrow(0, start, rows * dim).view(rows, dim)
            # In float32 at least: the multiplier may be more than float16 holds.
            weight_RD.sub_(gradient_RD * multiplier_R.unsqueeze(1), alpha=self.learning_rate)
        counters.end_step(config.half_life)


def average_and_apply(
    process_group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """DDP communication hook: averages the gradients and applies those of replicated tables.

    Returns:
        The averaged bucket, with zeros for the gradients that have been applied: DDP keeps them,
        and the next backward adds to them.
    """

    def finish(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        buffer = reduced.value()[0].div_(process_group.size())
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            tbe = getattr(parameter, "_replicated_tbe", None)
            if tbe is not None:
                tbe.apply(gradient)
                gradient.zero_()
        return buffer

    work = dist.all_reduce(bucket.buffer(), group=process_group, async_op=True)
    averaged: torch.futures.Future[Tensor] = work.get_future().then(finish)
    return averaged


class _Update:
    """What one forward keeps for its backward."""

    def __init__(self, tbe: ReplicatedTBE, batch: Batch) -> None:
        self.tbe = tbe
        self.batch = batch
        counts_R = tbe.group.counters.counts
        self._lookups_F = tbe.group.lookups_of_feature(batch)
        self._feature_L = tbe.group.feature_of_lookup(batch, self._lookups_F)
        rows_L = tbe.group.rows_of_lookup(batch, self._feature_L)
        self._occurrences_R = count_occurrences_(torch.zeros_like(counts_R), rows_L)
        self._work = None
        if tbe._process_group is not None:
            self._work = dist.all_reduce(
                self._occurrences_R, group=tbe._process_group, async_op=True
            )

    @torch.no_grad()
    def on_output_grad(self, grad: Tensor) -> None:
        """Counts the global batch; the gradient is applied when DDP has averaged it."""
        group = self.tbe.group
        if self._work is not None:
            self._work.wait()
        group.counters.begin_step(group.config.count)
        group.counters.add_occurrences(self._occurrences_R, group.config.count)
        if group.config.normalize is not None:
            # The gradient of this rank's mean loss; 1 / ranks of it is that of the global batch.
            group.measure(
                self.batch, self._lookups_F, self._feature_L, grad, factor=1 / self.tbe._ranks
            )
            self.tbe._inverse_T = group.inverse_scales()
