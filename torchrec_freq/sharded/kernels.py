"""TorchRec's kernels of a group of tables, on our TBEs, and the optimizers that stand for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

from torch import nn
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbedding,
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_freq.config import FrequencyConfig, pop_config
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.tbe import FrequencyTBE, stock_options
from torchrec_freq.sharded.tables import FrequencyTables, LocalShard

_FBGEMM_LEARNING_RATE: Final = 0.01
"""What FBGEMM takes where fused params name none."""


class _RowStateOptimizer(FusedOptimizer):
    """A fused optimizer whose state is that of its tables, made anew whenever it is asked for."""

    tables: FrequencyTables | None = None
    _table_of: Mapping[Any, str] = {}

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """For each table's weight its state by key; empty until its module is complete."""
        if self.tables is None or self.tables.moving:
            return {weight: {} for weight in self._table_of}
        return {weight: self.tables.state_dict(name) for weight, name in self._table_of.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """TorchRec's own state of these tables is empty."""

    def _name_tables(self) -> None:
        # The module that holds this optimizer will put its own path before these keys.
        suffix = ".weight"
        self._table_of = {weight: key.removesuffix(suffix) for key, weight in self.params.items()}


class FrequencyFusedOptimizer(_RowStateOptimizer, EmbeddingFusedOptimizer):
    """TorchRec's fused optimizer, with the counters in its state."""

    @classmethod
    def adopt(cls, optimizer: EmbeddingFusedOptimizer) -> None:
        """Turns a stock one into this class in place."""
        optimizer.__class__ = cls
        optimizer._name_tables()


class ReplicatedFusedOptimizer(_RowStateOptimizer):
    """Hands the learning rate of data-parallel tables to their TBE, as TorchRec's own does."""

    def __init__(self, tbe: ReplicatedTBE, parameters: Mapping[str, nn.Parameter]) -> None:
        self._tbe = tbe
        group = {"params": list(parameters.values()), "lr": tbe.learning_rate}
        params = {f"{table}.weight": parameter for table, parameter in parameters.items()}
        super().__init__(params, {}, [group])
        self._name_tables()

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.step()

    def step(self, closure: Any = None) -> None:
        self._tbe.set_learning_rate(self.param_groups[0]["lr"])

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        self._tbe.update_hyper_parameters(params_dict)


class ModuleOptimizer(CombinedOptimizer):
    """TorchRec's optimizer of a sharded module, which every rank has, also one without a shard.

    All ranks must ask for its state: what the last step added to the totals is exchanged then.
    """

    tables: FrequencyTables

    @classmethod
    def adopt(cls, optimizer: CombinedOptimizer, tables: FrequencyTables) -> None:
        """Turns a stock one into this class in place."""
        optimizer.__class__ = cls
        optimizer.tables = tables

    def settle(self) -> None:
        """Takes in the last step's totals."""
        if not self.tables.moving:
            self.tables.totals.settle()

    @property
    def state(self) -> Mapping[Any, Any]:
        """That of its parts."""
        self.settle()
        state: Mapping[Any, Any] = super().state
        return state


def settle(optimizer: Any) -> None:
    """Takes in the last step's totals of all modules that an optimizer stands for."""
    if isinstance(optimizer, ModuleOptimizer):
        optimizer.settle()
    for _, part in getattr(optimizer, "_optims", ()):
        settle(part)
    if (wrapped := getattr(optimizer, "_optimizer", None)) is not None:
        settle(wrapped)


class _Fused(FusedOptimizerModule):
    """What the kernels of sharded tables add to TorchRec's fused ones."""

    def __init__(self, config: GroupedEmbeddingConfig, **kwargs: Any) -> None:
        stock, frequency = _split(config, fused=True)
        super().__init__(stock, **kwargs)
        FrequencyTBE.adopt(self._emb_module, frequency)
        FrequencyFusedOptimizer.adopt(self._optim)


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


def local_shards(lookups: list[nn.Module], rank: int) -> list[LocalShard]:
    """This rank's shards of our tables in freshly made ``lookups``."""
    shards = []
    for kernel in our_kernels(lookups):
        for index, config in enumerate(kernel.config.embedding_tables):
            columns, row_offset, primary = config.embedding_dim, 0, rank == 0
            if config.local_metadata is not None:  # else data parallel: whole on every rank
                row_offset, column_offset = config.local_metadata.shard_offsets
                columns, primary = config.local_cols, column_offset == 0
            tbe = kernel.emb_module
            shards.append(LocalShard(config.name, row_offset, columns, primary, tbe, index))
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
