"""The engine: FBGEMM's fused SGD embedding, its backward scaled by the multiplier of each row.

FBGEMM's backward applies ``w_i -= lr * sum_l weight_l * gradient_bag(l)`` over the lookups ``l`` of
row ``i``, where ``weight_l`` is the per-sample weight that the forward saved. This module hands the
backward ``weight_l * multiplier_i`` instead, so the update stays inside FBGEMM's one fused kernel:

1. forward: run the stock operator with explicit per-sample weights (ones if there are none), under
   a saved-tensor hook that recognises them;
2. backward, before the operator's own: a hook on the output's gradient counts the batch's rows,
   and turns counts, steps and table scale into one multiplier a lookup;
3. backward of the operator: it unpacks the saved weights and gets them times the multiplier.
"""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counters import RowCounters
from torchrec_freq.rule import row_multiplier
from torchrec_freq.scale import TableScales


def lookups_of_feature(offsets: Tensor, features: int) -> Tensor:
    """Number of lookups of each feature.

    Args:
        offsets: [features * batch + 1] bag offsets, feature-major, as FBGEMM takes them.

    Returns:
        [features], of the type of ``offsets``.
    """
    batch = (offsets.numel() - 1) // features
    return offsets.as_strided((features + 1,), (batch,)).diff()


def feature_of_lookup(offsets: Tensor, features: int, lookups: int) -> Tensor:
    """Feature of each lookup, without reading the device.

    Args:
        offsets: [features * batch + 1] bag offsets, feature-major.
        features: number of features.
        lookups: number of lookups, ``offsets[-1]``.

    Returns:
        int64 [lookups], ascending.
    """
    feature_F = torch.arange(features, device=offsets.device)
    lengths_F = lookups_of_feature(offsets, features)
    return torch.repeat_interleave(feature_F, lengths_F, output_size=lookups)


def mean_pooling_weights(offsets: Tensor, weights_L: Tensor | None, lookups: int) -> Tensor:
    """Weights that turn sum pooling into mean pooling: ``weights / length of the bag``.

    Returns:
        float32 [lookups].
    """
    lengths_B = offsets.diff()
    inverse_B = lengths_B.clamp(min=1).to(torch.float32).reciprocal_()
    inverse_L = torch.repeat_interleave(inverse_B, lengths_B, output_size=lookups)
    return inverse_L if weights_L is None else weights_L * inverse_L


def bag_square_sums(grad: Tensor, dims: list[int]) -> Tensor:
    """Sum of squares over the columns of each feature's part of a pooled output's gradient.

    Args:
        grad: [batch, sum of dims].
        dims: columns of each feature.

    Returns:
        float32 [features, batch].
    """
    parts_B = []
    first = column = 0
    while first < len(dims):
        # Neighbours of equal width are one strided view: one kernel instead of one a feature.
        last = first
        while last < len(dims) and dims[last] == dims[first]:
            last += 1
        width = (last - first) * dims[first]
        run_BFD = grad.narrow(1, column, width).unflatten(1, (last - first, dims[first]))
        parts_B.append(torch.linalg.vector_norm(run_BFD, dim=2, dtype=torch.float32).square_())
        first, column = last, column + width
    return (parts_B[0] if len(parts_B) == 1 else torch.cat(parts_B, dim=1)).t()


class FrequencyTBE(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's table-batched embedding with the frequency-aware update in its backward.

    Takes the arguments of ``SplitTableBatchedEmbeddingBagsCodegen`` except ``optimizer``.

    Args:
        frequency: the rule's settings.

    Attributes:
        counters: counts and steps of the tables of this TBE.
        scales: gradient scales; shared by all shards of a sharded module (:meth:`share_scales`).

    Raises:
        ValueError: an FBGEMM option that the rule would silently ignore.
    """

    counters: RowCounters
    scales: TableScales
    pooling_mode: PoolingMode

    def __init__(self, *args: Any, frequency: FrequencyConfig, **kwargs: Any) -> None:
        super().__init__(*args, optimizer=EmbOptimType.EXACT_SGD, **kwargs)
        self._start(frequency)

    @classmethod
    def adopt(
        cls, tbe: SplitTableBatchedEmbeddingBagsCodegen, frequency: FrequencyConfig
    ) -> FrequencyTBE:
        """Turns a stock TBE, made by somebody else with ``EXACT_SGD``, into this class in place."""
        if type(tbe) is not SplitTableBatchedEmbeddingBagsCodegen:
            raise TypeError(f"cannot adopt a {type(tbe).__name__}: the engine knows only FBGEMM's")
        tbe.__class__ = cls
        assert isinstance(tbe, cls)
        tbe._start(frequency)
        return tbe

    def _start(self, frequency: FrequencyConfig) -> None:
        if self.optimizer != EmbOptimType.EXACT_SGD:
            raise ValueError(f"the engine runs on EXACT_SGD, not on {self.optimizer}")
        if self.optimizer_args.gradient_clipping:
            raise ValueError(
                "gradient_clipping=True: FBGEMM would clip after the row's multiplier, which is "
                "another rule; set it to False"
            )
        self.frequency = frequency
        device = self.current_device
        self.counters = RowCounters([spec[0] for spec in self.embedding_specs], device)
        self._dims = [self.embedding_specs[t][1] for t in self.feature_table_map]
        table_F = torch.tensor(self.feature_table_map, dtype=torch.int64, device=device)
        self.register_buffer("_table_of_feature", table_F, persistent=False)
        # Tells FBGEMM that no gradient of the weights is wanted: it costs as much as the update.
        no_grad_F = torch.zeros(len(self._dims), dtype=torch.int32, device=device)
        self.register_buffer("_no_weight_grad", no_grad_F, persistent=False)
        # FBGEMM's CPU backward ignores 1/length where weights are given, so mean pooling is done
        # by the weights.
        self._mean_pooling = self.pooling_mode == PoolingMode.MEAN
        if self._mean_pooling:
            self.pooling_mode = PoolingMode.SUM
        names = [str(t) for t in range(len(self.embedding_specs))]
        dim_F = torch.tensor(self._dims, dtype=torch.int64, device=device)
        self.register_buffer("_dim_of_feature", dim_F, persistent=False)
        self._own_scales = True
        self.scales = TableScales(names, device)
        self.register_buffer("_scale_of_feature", table_F.clone(), persistent=False)

    def share_scales(self, scales: TableScales, positions: list[int]) -> None:
        """Uses ``scales`` from now on; its owner calls ``exchange()`` before each forward.

        Args:
            positions: position in ``scales.names`` of each table of this TBE.
        """
        self.scales = scales
        self._own_scales = False
        self._scale_of_feature.copy_(torch.tensor([positions[t] for t in self.feature_table_map]))

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
        if batch_size_per_feature_per_rank is not None:
            raise NotImplementedError(
                "FrequencySGD does not support a variable batch size per feature yet; "
                "give all features of the KeyedJaggedTensor the same batch size"
            )
        lookups = indices.numel()
        weights_L = per_sample_weights
        if weights_L is not None:
            # FBGEMM casts to float32 too, but on a copy that the hook would not recognise.
            weights_L = weights_L.to(torch.float32)
        if self._mean_pooling:
            weights_L = mean_pooling_weights(offsets, weights_L, lookups)
        if not torch.is_grad_enabled():
            output: Tensor = super().forward(indices, offsets, weights_L, **kwargs)
            return output

        if self._own_scales and self.frequency.normalize is not None:
            self.scales.exchange()
        if lookups == 0 or self.is_nobag:
            update = _Update(self, None)
            output = super().forward(indices, offsets, weights_L, feature_requires_grad, **kwargs)
        else:
            if weights_L is None:
                weights_L = torch.ones(lookups, dtype=torch.float32, device=indices.device)
            if feature_requires_grad is None and not weights_L.requires_grad:
                feature_requires_grad = self._no_weight_grad
            update = _Update(self, weights_L.detach())
            with torch.autograd.graph.saved_tensors_hooks(update.pack, update.unpack):
                output = super().forward(
                    indices, offsets, weights_L, feature_requires_grad, **kwargs
                )
            if update.packed != 1:
                raise RuntimeError(
                    f"FBGEMM saved the per-sample weights {update.packed} times instead of once: "
                    "this version of FBGEMM is not one that torchrec_freq knows"
                )
        # Bounds-checked by the stock forward, and overwritten by the next one.
        update.indices, update.offsets = self._indices, self._offsets
        if output.requires_grad:
            output.register_hook(update.on_output_grad)
        return output


class _Update:
    """What one forward keeps for its backward."""

    indices: Tensor
    offsets: Tensor

    def __init__(self, tbe: FrequencyTBE, weights_L: Tensor | None) -> None:
        self.tbe = tbe
        self.weights_L = weights_L
        self.packed = 0
        self.multiplier_L: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Update:
        weights_L = self.weights_L
        if (
            weights_L is not None
            and tensor.dtype == torch.float32
            and tensor.numel() == weights_L.numel()
            and tensor.data_ptr() == weights_L.data_ptr()
        ):
            self.packed += 1
            return self
        return tensor

    def unpack(self, packed: Tensor | _Update) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert self.weights_L is not None
        if self.multiplier_L is None:
            raise RuntimeError(
                "FBGEMM's backward ran before the hook on its output: this version of torch is "
                "not one that torchrec_freq knows"
            )
        return self.weights_L * self.multiplier_L

    @torch.no_grad()
    def on_output_grad(self, grad: Tensor) -> Tensor | None:
        """Counts the batch and computes its multipliers; runs before FBGEMM's backward."""
        tbe, config = self.tbe, self.tbe.frequency
        counters, scales = tbe.counters, tbe.scales
        counters.begin_step(config.count)
        lookups, features = self.indices.numel(), len(tbe._dims)
        result = None
        if lookups:
            feature_L = feature_of_lookup(self.offsets, features, lookups)
            rows_L = self.indices.to(torch.int64) + tbe.hash_size_cumsum.index_select(0, feature_L)
            counters.add(rows_L, config.count)
            steps_L = inverse_L = None
            if config.coherence:
                steps_F = counters.device_steps.index_select(0, tbe._table_of_feature)
                steps_L = steps_F.index_select(0, feature_L)
            if config.normalize is not None:
                inverse_F = scales.inverse().index_select(0, tbe._scale_of_feature)
                inverse_L = inverse_F.index_select(0, feature_L)
                self._measure(grad, feature_L)
            self.multiplier_L = row_multiplier(config, counters.gather(rows_L), steps_L, inverse_L)
            if tbe.is_nobag:
                result = grad * self.multiplier_L.unsqueeze(1).to(grad.dtype)
        counters.end_step(config.half_life)
        return result

    def _measure(self, grad: Tensor, feature_L: Tensor) -> None:
        tbe = self.tbe
        if tbe.is_nobag:
            squares_L = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32).square_()
            squares_F = squares_L.new_zeros(len(tbe._dims)).index_add_(0, feature_L, squares_L)
        else:
            assert self.weights_L is not None
            weights_B = torch.ops.fbgemm.segment_sum_csr(
                1, self.offsets, self.weights_L.square()
            ).view(len(tbe._dims), -1)
            squares_F = (bag_square_sums(grad, tbe._dims) * weights_B).sum(dim=1)
        elements_F = lookups_of_feature(self.offsets, len(tbe._dims)) * tbe._dim_of_feature
        tbe.scales.add(tbe._scale_of_feature, squares_F, elements_F)
