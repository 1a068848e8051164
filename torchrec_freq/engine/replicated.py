"""Data-parallel tables: the same rule where every rank holds the whole table.

TorchRec replicates such a table, has DDP average its dense gradient over the ranks, and drops the
optimizer that was named for it. Here a DDP communication hook applies the rule as soon as the
gradient is averaged, with occurrences that are summed over the ranks too: that sum starts in the
backward of the lookup, so it overlaps with the rest of the backward.

The update costs a pass over the table's rows, as the averaging of the dense gradient does.
"""

# No postponed annotations: DDP compares those of its communication hook with the types themselves.

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import COUNT_CEILING
from torchrec_freq.engine.counting import CountingTBE
from torchrec_freq.engine.tbe import only
from torchrec_freq.rule import may_move, row_multiplier


class ReplicatedTBE(CountingTBE, DenseTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's dense table-batched embedding, updated by the rule in DDP's backward.

    Its counts, sums and totals are equal on every rank.
    """

    _sums: Tensor
    _process_group: dist.ProcessGroup | None
    _occurrences: list[tuple[Tensor, dist.Work | None]]
    _bags_F: Tensor | None

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
        tbe._start(frequency, feature_table_map, tbe.weights.device)
        tbe._sums = torch.zeros_like(tbe.counts, dtype=torch.float32)
        tbe.learning_rate = learning_rate
        ranks = 1 if process_group is None else process_group.size()
        tbe._process_group = process_group if ranks > 1 else None
        tbe._occurrences = []
        tbe.weights._replicated_tbe = tbe
        return tbe

    @property
    def sums(self) -> Tensor:
        """float32 [rows of all tables]: what row-wise Adagrad would have in ``momentum1``."""
        return self._sums

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the next steps."""
        self.learning_rate = lr

    def get_learning_rate(self) -> float:
        """Learning rate of the next step, as FBGEMM's fused TBE gives its own."""
        return self.learning_rate

    def update_hyper_parameters(self, params_dict: dict[str, float]) -> None:
        """As FBGEMM's fused TBE has it, for lr and eps.

        Raises:
            ValueError: another parameter, which would be ignored.
        """
        only({"lr", "eps"}, params_dict)
        self.learning_rate = params_dict.get("lr", self.learning_rate)
        eps = params_dict.get("eps", self.frequency.eps)
        self.frequency = dataclasses.replace(self.frequency, eps=eps)

    def _generate_vbe_metadata(self, *args: object, **kwargs: object) -> object:
        # The stock forward keeps it no longer than it needs it.
        metadata = super()._generate_vbe_metadata(*args, **kwargs)
        self._bags_F = metadata.B_offsets
        return metadata

    def _watch(self, node: Any, indices: Tensor, offsets: Tensor) -> None:
        bags_F = self._bags_F
        node.register_prehook(lambda _: self._count(indices, offsets, bags_F))

    @torch.no_grad()
    def _count(self, ids_L: Tensor, offsets_B: Tensor, bags_F: Tensor | None) -> None:
        """Starts to count the global batch; it is applied when DDP has averaged the gradient."""
        rows_L = self.features.look_up(ids_L, offsets_B, bags_F).rows_L
        occurrences_R = torch.zeros_like(self.counts)
        occurrences_R.scatter_add_(0, rows_L, torch.ones_like(rows_L, dtype=torch.int32))
        work = None
        if self._process_group is not None:
            work = dist.all_reduce(occurrences_R, group=self._process_group, async_op=True)
        self._occurrences.append((occurrences_R, work))

    @torch.no_grad()
    def apply(self, gradient: Tensor) -> None:
        """Updates the tables.

        Args:
            gradient: that of ``weights``, averaged over the ranks.
        """
        backwards, self._occurrences = self._occurrences, []
        occurrences_R = torch.zeros_like(self.counts)
        for part_R, work in backwards:
            if work is not None:
                work.wait()
            if part_R.is_cuda:  # DDP calls this on a stream of its own
                part_R.record_stream(torch.cuda.current_stream(part_R.device))
            occurrences_R += part_R
        for table, (rows, dim) in enumerate(self.embedding_specs):
            start = self.weights_physical_offsets[table]
            weight_RD = self.weights.narrow(0, start, rows * dim).view(rows, dim)
            gradient_RD = gradient.narrow(0, start, rows * dim).view(rows, dim)
            self._update(table, weight_RD, gradient_RD, self.rows_of(table, occurrences_R))
        if self.frequency.count != "frozen":
            self.counts.add_(occurrences_R).clamp_(max=COUNT_CEILING)
        if backwards:
            self.totals.end_step()

    def _update(
        self, table: int, weight_RD: Tensor, gradient_RD: Tensor, occurrences_R: Tensor
    ) -> None:
        config, position = self.frequency, self._members[table].position
        counts_R, sums_R = self.rows_of(table, self.counts), self.rows_of(table, self.sums)
        squares_R = gradient_RD.to(torch.float32).square().mean(dim=1)
        after_R = counts_R if config.count == "frozen" else counts_R + occurrences_R
        multiplier_R = row_multiplier(
            config,
            after_R if config.normalize is None else counts_R,
            sums_R,
            self.totals.rho().narrow(0, position, 1),
            squares_R,
        )
        admitted_R = may_move(config, after_R)
        multiplier_R, squares_R = multiplier_R * admitted_R, squares_R.where(admitted_R, 0.0)
        # In float32 at least: the multiplier may be more than float16 holds.
        weight_RD.sub_(gradient_RD * multiplier_R.unsqueeze(1), alpha=self.learning_rate)
        if config.normalize is None:
            return
        sums_R += squares_R
        if self.totals.sampled():
            position_1 = self._position_F.new_full((1,), position)
            occurred_R = occurrences_R.where(admitted_R, 0)
            self.totals.add(position_1, squares_R.sum().view(1), occurred_R.sum().view(1))


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
