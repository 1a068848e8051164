"""TorchRec's kernels of a group of tables, on our TBEs, and the optimizers that stand for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbedding,
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule

from torchrec_freq.config import FrequencyConfig, pop_config
from torchrec_freq.counts.state import MOMENTUM
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.tbe import FrequencyTBE, stock_options
from torchrec_freq.sharded.tables import FrequencyTables, LocalShard

_FBGEMM_LEARNING_RATE: Final = 0.01
"""What FBGEMM takes where fused params name none."""


class ReplicatedFusedOptimizer(FusedOptimizer):
    """Hands the learning rate of data-parallel tables to their TBE, as TorchRec's own does."""

    def __init__(self, tbe: ReplicatedTBE, parameters: Mapping[str, nn.Parameter]) -> None:
        self._tbe = tbe
        group = {"params": list(parameters.values()), "lr": tbe.learning_rate}
        params = {f"{table}.weight": parameter for table, parameter in parameters.items()}
        super().__init__(params, {parameter: {} for parameter in parameters.values()}, [group])

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.step()

    def step(self, closure: Any = None) -> None:
        self._tbe.set_learning_rate(self.param_groups[0]["lr"])

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        self._tbe.update_hyper_parameters(params_dict)


class _Fused(FusedOptimizerModule):
    """What the kernels of sharded tables add to TorchRec's fused ones."""

    def __init__(self, config: GroupedEmbeddingConfig, **kwargs: Any) -> None:
        stock, frequency = _split(config, fused=True)
        super().__init__(stock, **kwargs)
        FrequencyTBE.adopt(self._emb_module, frequency)


class FrequencyEmbeddingBag(_Fused, BatchedFusedEmbeddingBag):
    """TorchRec's kernel for pooled tables, on our TBE."""


class FrequencyEmbedding(_Fused, BatchedFusedEmbedding):
    """TorchRec's kernel for sequence tables, on our TBE."""


class _Replicated(FusedOptimizerModule):
    """What the kernels of data-parallel tables add to TorchRec's dense ones."""

    def __init__(self, config: GroupedEmbeddingConfig, **kwargs: Any) -> None:
        stock, frequency = _split(config, fused=False)
        super().__init__(stock, **kwargs)
        learning_rate = (config.fused_params or {}).get("learning_rate", _FBGEMM_LEARNING_RATE)
        tbe = ReplicatedTBE.adopt(
            self._emb_module, frequency, self._feature_table_map, learning_rate, self._pg
        )
        for parameter in self._param_per_table.values():
            # By this mark TorchRec's users keep a parameter out of their dense optimizer.
            parameter._in_backward_optimizers = [EmptyFusedOptimizer()]
        self._optim = ReplicatedFusedOptimizer(tbe, self._param_per_table)

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optim


class ReplicatedEmbeddingBag(_Replicated, BatchedDenseEmbeddingBag):
    """TorchRec's kernel for data-parallel pooled tables, on our TBE."""


class ReplicatedEmbedding(_Replicated, BatchedDenseEmbedding):
    """TorchRec's kernel for data-parallel sequence tables, on our TBE."""


def our_kernels(lookups: list[nn.Module]) -> list[Any]:
    """Our kernels in a sharded module's lookups."""
    return [
        m for lookup in lookups for m in lookup.modules() if isinstance(m, (_Fused, _Replicated))
    ]


def add_states(lookups: list[nn.Module], tables: FrequencyTables) -> None:
    """Adds our states to TorchRec's own in the optimizers of our kernels."""
    for kernel in our_kernels(lookups):
        optimizer = kernel.fused_optimizer
        for key, weight in optimizer.params.items():
            name, state = key.removesuffix(".weight"), optimizer.state[weight]
            if kernel.emb_module.frequency.normalize is None:
                state.pop(f"{name}.{MOMENTUM}", None)  # the paper's rule has no sums
            state.update(tables.state_dict(name))


def end_steps_with(lookups: list[Any], end: Callable[[], None]) -> None:
    """Calls ``end`` in each backward of lookups that have no table on this rank."""
    for lookup in lookups:
        if hasattr(lookup, "_dummy_embs_tensor") and not len(lookup._emb_modules):
            # It takes part in the backward of the output's exchange.
            lookup._dummy_embs_tensor.register_hook(lambda _: end())


def local_shards(lookups: list[nn.Module], rank: int) -> list[LocalShard]:
    """This rank's shards of our tables in freshly made ``lookups``."""
    shards = []
    for kernel in our_kernels(lookups):
        for index, config in enumerate(kernel.config.embedding_tables):
            columns, row_offset, column_offset, first = config.embedding_dim, 0, 0, rank == 0
            if config.local_metadata is not None:  # else data parallel: whole on every rank
                row_offset, column_offset = config.local_metadata.shard_offsets
                columns, first = config.local_cols, True
            shards.append(
                LocalShard(
                    table=config.name,
                    row_offset=row_offset,
                    column_offset=column_offset,
                    columns=columns,
                    primary=column_offset == 0,
                    first=first,
                    tbe=kernel.emb_module,
                    index=index,
                )
            )
    return shards


def _split(
    config: GroupedEmbeddingConfig, *, fused: bool
) -> tuple[GroupedEmbeddingConfig, FrequencyConfig]:
    """A copy of ``config`` that the stock kernel accepts, and what it does not."""
    params = dict(config.fused_params or {})
    frequency = pop_config(params, params.pop("optimizer"))
    stock = copy.copy(config)
    stock.fused_params = {**params, **stock_options(frequency)} if fused else params
    return stock, frequency
