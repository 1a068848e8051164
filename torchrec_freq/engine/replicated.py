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
from torchrec_freq.engine.counters import added, count_occurrences_, counted
from torchrec_freq.engine.counting import CountingTBE, only_lr_and_eps
from torchrec_freq.engine.lookups import Batch
from torchrec_freq.engine.turn import used_here
from torchrec_freq.rule import entering_squares, row_multiplier


class ReplicatedTBE(CountingTBE, DenseTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's dense table-batched embedding, updated by the rule in DDP's backward.

    Its counts and totals are equal on every rank.
    """

    _counts: Tensor
    _process_group: dist.ProcessGroup | None
    _occurrences: list[tuple[Tensor, dist.Work | None]]
    _bag_starts_F: Tensor | None

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
        rows = sum(spec[0] for spec in tbe.embedding_specs)
        tbe._counts = torch.zeros(rows, dtype=torch.int32, device=tbe.weights.device)
        tbe._start(frequency, feature_table_map, tbe.weights.device)
        tbe.learning_rate = learning_rate
        ranks = 1 if process_group is None else process_group.size()
        tbe._process_group = process_group if ranks > 1 else None
        tbe._occurrences = []
        tbe.weights._replicated_tbe = tbe
        return tbe

    @property
    def counts(self) -> Tensor:
        """int32 [rows of all tables]: the memory itself."""
        return self._counts

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the next steps."""
        self.learning_rate = lr

    def get_learning_rate(self) -> float:
        """Learning rate of the next step, as FBGEMM's fused TBE gives its own."""
        return self.learning_rate

    def update_hyper_parameters(self, params_dict: dict[str, float]) -> None:
        """As FBGEMM's fused TBE has it, for lr and eps.

        Raises:
            ValueError: another parameter, which the rule would ignore.
        """
        only_lr_and_eps(params_dict)
        self.learning_rate = params_dict.get("lr", self.learning_rate)
        eps = params_dict.get("eps", self.frequency.eps)
        self.frequency = dataclasses.replace(self.frequency, eps=eps)

    def _generate_vbe_metadata(self, *args: object, **kwargs: object) -> object:
        # The stock forward keeps it no longer than it needs it.
        metadata = super()._generate_vbe_metadata(*args, **kwargs)
        self._bag_starts_F = metadata.B_offsets
        return metadata

    def _watch(self, node: Any, batch: Batch) -> None:
        batch.bag_starts_F = self._bag_starts_F
        node.register_prehook(lambda grads: self._count(batch, grads[0]))

    @torch.no_grad()
    def _count(self, batch: Batch, grad: Tensor | None) -> None:
        """Starts to count the global batch; it is applied when DDP has averaged the gradient."""
        lookups = self.layout.of(batch, grad)
        occurrences_R = torch.zeros_like(self._counts)
        count_occurrences_(occurrences_R, lookups.rows_L, lookups.trained_L)
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
        occurrences_R = torch.zeros_like(self._counts)
        for part_R, work in backwards:
            if work is not None:
                work.wait()
            occurrences_R += used_here(part_R)  # DDP calls this on a stream of its own
        with self._turn:
            self._apply_all(gradient, occurrences_R)
            for _ in backwards:
                self.totals.end_backward(self._aged)

    def _apply_all(self, gradient: Tensor, occurrences_R: Tensor) -> None:
        config = self.frequency
        per_count_T, limit_T = self.totals.rates()
        after_R = counted(config.count, self._counts, self._counts + occurrences_R)
        for table, (rows, dim) in enumerate(self.embedding_specs):
            position = self._members[table].position
            start = self.weights_physical_offsets[table]
            weight_RD = self.weights.narrow(0, start, rows * dim).view(rows, dim)
            gradient_RD = gradient.narrow(0, start, rows * dim).view(rows, dim)
            squares_R = gradient_RD.to(torch.float32).square().mean(dim=1)
            counts_R, k_R = self._table(after_R, table), self._table(occurrences_R, table)
            multiplier_R = row_multiplier(
                config, counts_R, squares_R, per_count_T.narrow(0, position, 1)
            )
            # In float32 at least: the multiplier may be more than float16 holds.
            weight_RD.sub_(gradient_RD * multiplier_R.unsqueeze(1), alpha=self.learning_rate)
            if config.normalize is None:
                squares_R.zero_()
            entering_R = entering_squares(squares_R, k_R, limit_T.narrow(0, position, 1)) * k_R
            sums = [entering_R.sum(), added(config.count, k_R).sum(), k_R.sum()]
            slot = self._slot_F.narrow(0, self.layout.feature_table_map.index(table), 1)
            self.totals.add(slot, *(total.view(1) for total in sums), replicated=True)
        self._counts += after_R - self._counts


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
