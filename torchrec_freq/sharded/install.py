"""What is registered with TorchRec and wrapped in it, once, when the package is imported.

What a new TorchRec version could move is named here, in :mod:`torchrec_freq.sharded.kernels` and in
:mod:`torchrec_freq.sharded.opt_in`; what planning uses, in :mod:`torchrec_freq.planner`:

- ``_OPTIMIZER_CLASS_TO_EMB_OPT_TYPE`` takes the class;
- ``_create_embedding_kernel`` of the two grouped lookups makes our kernels for our tables;
- ``ShardedEmbeddingBagCollection`` and ``ShardedEmbeddingCollection`` are where every rank sees
  every table: there we refuse, before anything is built, and join the shards of a table;
- ``KeyedOptimizer.load_state_dict`` and DCP's ``create_default_local_load_plan`` read what row-wise
  Adagrad, version 0.2, and plans with other columns have saved
  (:mod:`torchrec_freq.sharded.loading`);
- ``EmbeddingStorageEstimator`` counts the bytes of sums and counters in every plan;
- zero-collision collections name the tables whose rows they evict by a feature;
- ``DMPCollection.sync`` averages counts and totals over the sharding groups.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torchrec.distributed.utils as torchrec_utils
from torch import nn
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection, get_ec_index_dedup
from torchrec.distributed.embedding_lookup import (
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import (
    BaseShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.planner import stats as planner_stats
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption, Storage
from torchrec.distributed.types import ShardingEnv2D
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.engine.counting import CountingTBE
from torchrec_freq.engine.replicated import average_and_apply
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.sharded.kernels import (
    FrequencyEmbedding,
    FrequencyEmbeddingBag,
    ReplicatedEmbedding,
    ReplicatedEmbeddingBag,
    add_states,
    end_steps_with,
    local_shards,
    our_kernels,
)
from torchrec_freq.sharded.loading import adapt, complete, mark, marked
from torchrec_freq.sharded.opt_in import (
    find_tables,
    is_frequency,
    refuse_index_dedup,
    trains_with_frequency,
    without_optimizer,
)
from torchrec_freq.sharded.tables import FrequencyTables

ROW_BYTES: Final = 8
"""Bytes of a row's state: its sum of squares and its counter."""

_TABLES: Final = "_frequency_tables"
# Names that DistributedModelParallel and DDP put in front of a module's own path.
_WRAPPERS: Final = ("_dmp_wrapped_module", "module")


def install() -> None:
    """Registers FrequencySGD with TorchRec. A second call does nothing."""
    optimizers: dict[Any, Any] = torchrec_utils._OPTIMIZER_CLASS_TO_EMB_OPT_TYPE
    if FrequencySGD in optimizers:
        return
    _wrap_kernel(
        GroupedPooledEmbeddingsLookup,
        fused=FrequencyEmbeddingBag,
        dense=ReplicatedEmbeddingBag,
        arguments=("pg", "device", "sharding_type"),
    )
    _wrap_kernel(
        GroupedEmbeddingsLookup,
        fused=FrequencyEmbedding,
        dense=ReplicatedEmbedding,
        arguments=("pg", "device"),
    )
    _wrap_sharded(ShardedEmbeddingBagCollection)
    _wrap_sharded(ShardedEmbeddingCollection)
    _wrap_loading()
    _wrap_planner()
    _wrap_eviction()
    _wrap_sync()
    optimizers[FrequencySGD] = FrequencyConfig()


def frequency_modules(model: nn.Module) -> Iterator[tuple[str, FrequencyTables]]:
    """Path and tables of each sharded module of ``model`` that trains with FrequencySGD."""
    for path, module in model.named_modules():
        tables = module.__dict__.get(_TABLES)
        if tables is not None:
            yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), tables


def _wrap_kernel(
    lookup: type[Any], *, fused: type[Any], dense: type[Any], arguments: Sequence[str]
) -> None:
    stock = lookup._create_embedding_kernel
    signature = inspect.signature(stock)
    kernels = {EmbeddingComputeKernel.FUSED: fused, EmbeddingComputeKernel.DENSE: dense}

    @functools.wraps(stock)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if not is_frequency(given["config"].fused_params):
            return stock(self, *args, **kwargs)
        kernel = kernels[given["config"].compute_kernel]
        made = kernel(given["config"], **{name: given.get(name) for name in arguments})
        # Only the stock method records that tables cached from host memory are to be prefetched.
        if hasattr(self, "_need_prefetch"):
            self._need_prefetch |= any(
                table.compute_kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING
                for table in given["config"].embedding_tables
            )
        return made

    lookup._create_embedding_kernel = create


def _wrap_sharded(sharded: type[Any]) -> None:
    stock_init, stock_lookups = sharded.__init__, sharded._create_lookups
    # Moving shards while training is TorchRec's for pooled tables only.
    stock_update: Any = getattr(sharded, "update_shards", None)
    signature = inspect.signature(stock_init)

    @functools.wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        plan = given["table_name_to_parameter_sharding"]
        shared = given.get("fused_params") or {}
        env, device = given["env"], given.get("device")
        tables = find_tables(given["module"], shared, plan, env, device)
        if not tables:
            stock_init(self, *args, **kwargs)
            return
        if "use_index_dedup" in signature.parameters and (
            given.get("use_index_dedup") or get_ec_index_dedup()
        ):
            refuse_index_dedup(tables)
        # nn.Module's own __setattr__ does not work before its __init__.
        if isinstance(env, ShardingEnv2D):
            handle = FrequencyTables(tables, env.sharding_pg, env.replica_pg)
        else:
            handle = FrequencyTables(tables, env.process_group)
        self.__dict__[_TABLES] = handle
        stock_init(self, *args, **kwargs)
        mark(self._optim, handle)
        for lookup in self._lookups:
            if isinstance(lookup, DistributedDataParallel) and our_kernels([lookup]):
                lookup.register_comm_hook(env.process_group, average_and_apply)

    @functools.wraps(stock_lookups)
    def create_lookups(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_lookups(self, *args, **kwargs)
        handle = self.__dict__.get(_TABLES)
        if handle is not None:
            handle.attach(local_shards(self._lookups, handle.rank), self._device)
            add_states(self._lookups, handle)
            end_steps_with(self._lookups, handle.totals.end_with_backward)

    def update_shards(self: Any, *args: Any, **kwargs: Any) -> None:
        handle = self.__dict__.get(_TABLES)
        if handle is None:
            stock_update(self, *args, **kwargs)
            return
        # TorchRec moves states that are sharded as the weights are; ours it must not find.
        states = {name: handle.read(name) for name in handle.tables}
        for kernel in our_kernels(self._lookups):
            for state in kernel.fused_optimizer.state.values():
                state.clear()
        stock_update(self, *args, **kwargs)
        mark(self._optim, handle)
        for name, state in states.items():
            handle.load(name, state)

    sharded.__init__ = init
    sharded._create_lookups = create_lookups
    if stock_update is not None:
        sharded.update_shards = functools.wraps(stock_update)(update_shards)


def _wrap_loading() -> None:
    stock_load = KeyedOptimizer.load_state_dict
    stock_plan = default_planner.create_default_local_load_plan

    @functools.wraps(stock_load)
    def load_state_dict(self: KeyedOptimizer, state_dict: Mapping[str, Any]) -> None:
        stock_load(self, complete(self, state_dict))
        for handle in marked(self):
            handle.finish_load()

    @functools.wraps(stock_plan)
    def create_plan(
        state_dict: dict[str, Any], metadata: Metadata, strict: bool = True
    ) -> LoadPlan:
        adapt(state_dict, metadata)
        return stock_plan(state_dict, metadata, strict)

    KeyedOptimizer.load_state_dict = load_state_dict
    default_planner.create_default_local_load_plan = create_plan


def _wrap_planner() -> None:
    """TorchRec takes an optimizer that it does not know for a second table; ours has counters.

    A shard of ``r`` rows has ``8 r`` bytes of sums and counters, whatever its columns and type,
    beside the table: in HBM on a GPU, also for tables in host memory (UVM); on a CPU in its memory.
    """
    stock = EmbeddingStorageEstimator.estimate
    stock_multiplier = planner_stats._get_optimizer_multipler

    @functools.wraps(stock)
    def estimate(
        self: Any, sharding_options: list[ShardingOption], sharder_data_map: dict[str, Any]
    ) -> None:
        ours = [option for option in sharding_options if is_ours(option, sharder_data_map)]
        with without_optimizer({id(o.tensor): o.tensor for o in ours}.values()):
            stock(self, sharding_options, sharder_data_map)
        if self._is_inference:
            return
        on_device = self._topology.compute_device != "cpu"
        for option in ours:
            for shard in option.shards:
                counters = ROW_BYTES * shard.size[0]
                shard.storage += Storage(
                    hbm=counters if on_device else 0, ddr=0 if on_device else counters
                )

    @functools.wraps(stock_multiplier)
    def multiplier(optimizer_class: Any, shape: torch.Size) -> float:
        if optimizer_class is FrequencySGD:
            return ROW_BYTES / (4 * int(shape[-1]))  # exact for float32
        result: float = stock_multiplier(optimizer_class, shape)
        return result

    EmbeddingStorageEstimator.estimate = estimate
    planner_stats._get_optimizer_multipler = multiplier


def _wrap_eviction() -> None:
    """FBGEMM resets the rows of a feature's table; TorchRec hands it the number of a table."""
    collection = BaseShardedManagedCollisionEmbeddingCollection
    stock = collection.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        for name, (tbe, table) in self._table_to_tbe_and_index.items():
            if isinstance(tbe, CountingTBE):
                feature = tbe.features.tables.index(int(table))
                self._table_to_tbe_and_index[name] = tbe, torch.full_like(table, feature)

    collection.__init__ = init


def _wrap_sync() -> None:
    """TorchRec's 2D parallelism averages weights and sums; we do counts and totals."""
    stock_sync, stock_cache = DMPCollection.sync, DMPCollection._cache_sync_tensors

    @functools.wraps(stock_cache)
    def cache(self: Any, contexts: Any) -> None:
        stock_cache(self, contexts)
        for context in contexts:
            for collection, table in context.hash_zch_modules:
                if isinstance(collection._table_to_tbe_and_index[table][0], FrequencyTBE):
                    raise ValueError(
                        f"Table {table!r}: DMPCollection moves the rows of a hashed zero-collision "
                        "table at its syncs, and would leave their counts behind. Use "
                        "DistributedModelParallel, or another optimizer for this table."
                    )

    @functools.wraps(stock_sync)
    def sync(self: Any, include_optimizer_state: bool = True) -> None:
        stock_sync(self, include_optimizer_state)
        if include_optimizer_state:
            for _, handle in frequency_modules(self):
                handle.average()

    DMPCollection.sync = sync
    DMPCollection._cache_sync_tensors = cache


def is_ours(option: ShardingOption, sharder_data_map: Mapping[str, Any]) -> bool:
    """Whether the table of a sharding option will train with FrequencySGD."""
    data = sharder_data_map.get(option.module_type_key)
    return trains_with_frequency(option.tensor, data.fused_params if data else None)
