"""The engine: FBGEMM's fused SGD embedding, its backward scaled by the multiplier of each row.

FBGEMM's backward applies ``w_i -= lr * sum_l weight_l * gradient_bag(l)`` over the lookups ``l`` of
row ``i``, where ``weight_l`` is the per-sample weight that the forward saved. This module hands the
backward ``weight_l * multiplier_i`` instead, so the update stays inside FBGEMM's one fused kernel:

1. forward: run the stock operator with explicit per-sample weights (ones if there are none), under
   a saved-tensor hook that recognises them;
2. backward, before the operator's own: a hook on the output's gradient counts the batch's rows,
   and turns counts, steps and table scale into one multiplier a lookup;
3. backward of the operator: it unpacks the saved weights and gets them times the multiplier.

Without pooling FBGEMM has no per-sample weights, but a gradient row a lookup, which the hook of
step 2 scales instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.group import Batch, TableGroup, VariableBatch

NOT_COMPILED: Final = "FrequencySGD works by autograd hooks, which a compiled graph would not run"
"""Why torch.compile stays out of the lookups; a message of its own where it is told to go in."""


def mean_pooling_weights(offsets: Tensor, weights_L: Tensor | None, lookups: int) -> Tensor:
    """Weights that turn sum pooling into mean pooling: ``weights / length of the bag``.

    Returns:
        float32 [lookups].
    """
    lengths_B = offsets.diff()
    inverse_B = lengths_B.clamp(min=1).to(torch.float32).reciprocal_()
    inverse_L = torch.repeat_interleave(inverse_B, lengths_B, output_size=lookups)
    return inverse_L if weights_L is None else weights_L * inverse_L


def before_backward(output: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Calls ``hook`` with the gradient of a TBE's output; what it returns replaces the gradient.

    Unlike a hook of the tensor it runs after all hooks of the tensor, whenever those were added:
    the output may also be that of the whole module, whose hook must come first.
    """
    node = output.grad_fn
    assert node is not None and output.output_nr == 0

    def prehook(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        replaced = hook(grads[0])
        return None if replaced is None else (replaced, *grads[1:])

    node.register_prehook(prehook)


class GroupedTBE:
    """What our TBEs add to FBGEMM's, fused or dense: a group, and what it must know of a batch.

    Attributes:
        group: counters and gradient scales of the tables.
    """

    group: TableGroup
    embedding_specs: list[Any]
    pooling_mode: PoolingMode

    def _start_group(
        self, frequency: FrequencyConfig, feature_table_map: list[int], device: torch.device
    ) -> None:
        self.group = TableGroup(
            frequency,
            [spec[0] for spec in self.embedding_specs],
            [spec[1] for spec in self.embedding_specs],
            feature_table_map,
            pooled=self.pooling_mode != PoolingMode.NONE,
            device=device,
        )
        # FBGEMM's CPU backward ignores 1/length where weights are given, so mean pooling is done
        # by the weights.
        self._mean_pooling = self.pooling_mode == PoolingMode.MEAN
        if self._mean_pooling:
            self.pooling_mode = PoolingMode.SUM

    def _pooling_weights(
        self, indices: Tensor, offsets: Tensor, weights_L: Tensor | None
    ) -> Tensor | None:
        """What sum pooling needs to pool as the tables do: [lookups], None for ones."""
        if not self._mean_pooling:
            return weights_L
        return mean_pooling_weights(offsets, weights_L, indices.numel())

    def _generate_vbe_metadata(self, *args: Any, **kwargs: Any) -> Any:
        # The stock forward keeps it no longer than it needs it.
        self._vbe_metadata = super()._generate_vbe_metadata(*args, **kwargs)  # type: ignore[misc]
        return self._vbe_metadata


def variable_batch(metadata: Any, sizes: list[list[int]] | None) -> VariableBatch | None:
    """The layout of a variable batch from FBGEMM's ``VBEMetadata``; None for a fixed batch.

    Args:
        sizes: [features][ranks] bags, as given to FBGEMM.
    """
    if sizes is None:
        return None
    outputs = metadata.vbe_output_offsets
    if outputs is None:
        outputs = metadata.output_offsets_feature_rank.narrow(
            0, 0, metadata.output_offsets_feature_rank.numel() - 1
        )
    return VariableBatch(sizes, metadata.B_offsets_rank_per_feature, outputs.view(-1, len(sizes)))


class FrequencyTBE(GroupedTBE, SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's table-batched embedding with the frequency-aware update in its backward.

    Takes the arguments of ``SplitTableBatchedEmbeddingBagsCodegen`` except ``optimizer``.

    Args:
        frequency: the rule's settings.

    Raises:
        ValueError: an FBGEMM option that the rule would silently ignore.
    """

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
        self._start_group(frequency, self.feature_table_map, self.current_device)
        # Tells FBGEMM that no gradient of the weights is wanted: it costs as much as the update.
        self._no_weight_grad = torch.zeros(
            len(self.feature_table_map), dtype=torch.int32, device=self.current_device
        )

        self._ones = torch.ones(0, device=self.current_device)

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
        lookups = indices.numel()
        weights_L = per_sample_weights
        if weights_L is not None:
            # FBGEMM does so too, but on a copy that the hook would not recognise.
            weights_L = weights_L.to(torch.float32).contiguous()
        weights_L = given_L = self._pooling_weights(indices, offsets, weights_L)
        # An empty tensor has no address to be recognised by, and without pooling there are none.
        hooked = torch.is_grad_enabled() and lookups > 0 and not self.is_nobag
        if hooked:
            if weights_L is None:
                weights_L = self._ones_L(lookups)
            if feature_requires_grad is None and not weights_L.requires_grad:
                feature_requires_grad = self._no_weight_grad
        update = _Update(self.group, weights_L if hooked else None, unweighted=given_L is None)
        with torch.autograd.graph.saved_tensors_hooks(update.pack, update.unpack):
            output: Tensor = super().forward(
                indices,
                offsets,
                weights_L,
                feature_requires_grad,
                batch_size_per_feature_per_rank,
                **kwargs,
            )
        if hooked and update.packed != 1:
            raise RuntimeError(
                f"FBGEMM saved the per-sample weights {update.packed} times instead of once: "
                "this version of FBGEMM is not one that torchrec_freq knows"
            )
        if output.requires_grad:
            # Bounds-checked by the stock forward, and overwritten by the next one.
            update.batch = Batch(
                self._indices,
                self._offsets,
                None if given_L is None else given_L.detach(),
                variable_batch(self._vbe_metadata, batch_size_per_feature_per_rank),
            )
            before_backward(output, update.on_output_grad)
        return output

    def _ones_L(self, lookups: int) -> Tensor:
        """[lookups] ones; a part of those of the largest batch so far, which are only read."""
        if self._ones.numel() < lookups:
            self._ones = torch.ones(lookups, dtype=torch.float32, device=self.current_device)
        return self._ones.narrow(0, 0, lookups)

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
        super().reset_embedding_weight_momentum(
            pruned_indices, pruned_indices_offsets, logical_table_ids, buffer_ids
        )
        bounds = pruned_indices_offsets.tolist()
        for feature, part in zip(logical_table_ids.tolist(), buffer_ids.tolist(), strict=True):
            evicted = pruned_indices[bounds[part] : bounds[part + 1]]
            self.group.forget(feature, evicted.to(self.current_device))


class _Update:
    """What one forward keeps for its backward."""

    batch: Batch

    def __init__(self, group: TableGroup, weights_L: Tensor | None, unweighted: bool) -> None:
        self.group = group
        self.unweighted = unweighted
        self.weights_L = None if weights_L is None else weights_L.detach()
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
        return self.multiplier_L if self.unweighted else self.weights_L * self.multiplier_L

    @torch.no_grad()
    def on_output_grad(self, grad: Tensor) -> Tensor | None:
        """Counts the batch and computes its multipliers; runs before FBGEMM's backward."""
        self.multiplier_L = self.group.step(self.batch, grad)
        if self.group.pooled or self.multiplier_L is None:
            return None
        # In float32: a multiplier may be more than a gradient in float16 can be.
        return (grad * self.multiplier_L.unsqueeze(1)).to(grad.dtype)
