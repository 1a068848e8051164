"""All contact with TorchRec's internals: opt in, make our kernels, refuse what cannot be exact.

What a new TorchRec version could move is named here and nowhere else:

- ``_OPTIMIZER_CLASS_TO_EMB_OPT_TYPE`` maps an optimizer class to the value of the ``"optimizer"``
  entry of a table's fused params. For ``FrequencySGD`` that value is a ``FrequencyConfig``: no
  stock kernel accepts it, so a path that is not covered here fails instead of training with SGD.
- ``_create_embedding_kernel`` of the two grouped lookups makes one kernel for a group of tables;
  groups that carry a ``FrequencyConfig`` get ours.
- ``ShardedEmbeddingBagCollection`` and ``ShardedEmbeddingCollection`` are where every rank sees
  every table: there we refuse, before anything is built, and join the shards' gradient scales,
  which each backward through the module's outputs exchanges, before the tables' updates and after.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torchrec.distributed.utils as torchrec_utils
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbedding,
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding import ShardedEmbeddingCollection, get_ec_index_dedup
from torchrec.distributed.embedding_lookup import (
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv2D, ShardingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_freq.config import FrequencyConfig, check_learning_rate, make_config, pop_config
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.replicated import ReplicatedTBE, average_and_apply
from torchrec_freq.tables import ROW_COUNTER, FrequencyTables, LocalShard, Output, Table
from torchrec_freq.tbe import NOT_COMPILED, FrequencyTBE

_TABLES: Final = "_frequency_tables"
_FBGEMM_LEARNING_RATE: Final = 0.01
"""What FBGEMM takes where fused params name none."""
# Names that DistributedModelParallel and DDP put in front of a module's own path.
_WRAPPERS: Final = ("_dmp_wrapped_module", "module")
_KERNELS: Final = (
    EmbeddingComputeKernel.FUSED.value,
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
)
# Options of other fused optimizers. FBGEMM's SGD ignores them without a word.
_FOREIGN_OPTIONS: Final = (
    "eps",
    "beta1",
    "beta2",
    "eta",
    "momentum",
    "weight_decay",
    "weight_decay_mode",
    "counter_based_regularization",
    "max_norm",
)


def fused_params(lr: float, **options: Any) -> dict[str, Any]:
    """Fused params that opt in all tables of a sharder.

    >>> from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    >>> sharder = EmbeddingBagCollectionSharder(fused_params=fused_params(lr=0.05))

    Args:
        lr: learning rate, at least 0.
        options: as those of :class:`torchrec_freq.FrequencySGD`.

    Returns:
        A dict to which FBGEMM's own fused params can be added.

    Raises:
        ValueError: an unknown keyword or a wrong value.
    """
    return {"optimizer": make_config(options), "learning_rate": check_learning_rate(lr)}


def frequency_modules(model: nn.Module) -> Iterator[tuple[str, FrequencyTables]]:
    """Path and tables of each sharded module of ``model`` that trains with FrequencySGD."""
    for path, module in model.named_modules():
        tables = module.__dict__.get(_TABLES)
        if tables is not None:
            yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), tables


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


class FrequencyEmbeddingBag(BatchedFusedEmbeddingBag):
    """TorchRec's fused kernel for pooled tables, on our TBE."""

    def __init__(self, config: GroupedEmbeddingConfig, **kwargs: Any) -> None:
        stock, frequency = _split(config)
        super().__init__(stock, **kwargs)
        self.frequency_group = FrequencyTBE.adopt(self._emb_module, frequency).group
        FrequencyFusedOptimizer.adopt(self._optim)


class FrequencyEmbedding(BatchedFusedEmbedding):
    """TorchRec's fused kernel for sequence tables, on our TBE."""

    def __init__(self, config: GroupedEmbeddingConfig, **kwargs: Any) -> None:
        stock, frequency = _split(config)
        super().__init__(stock, **kwargs)
        self.frequency_group = FrequencyTBE.adopt(self._emb_module, frequency).group
        FrequencyFusedOptimizer.adopt(self._optim)


class _Replicated(FusedOptimizerModule):
    """What the kernels of data-parallel tables add to TorchRec's dense ones."""

    def __init__(self, config: GroupedEmbeddingConfig, **kwargs: Any) -> None:
        stock, frequency = _split(config)
        super().__init__(stock, **kwargs)
        learning_rate = (config.fused_params or {}).get("learning_rate", _FBGEMM_LEARNING_RATE)
        tbe = ReplicatedTBE.adopt(
            self._emb_module, frequency, self._feature_table_map, learning_rate, self._pg
        )
        self.frequency_group = tbe.group
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


_KERNEL_TYPES: Final = (
    FrequencyEmbeddingBag,
    FrequencyEmbedding,
    ReplicatedEmbeddingBag,
    ReplicatedEmbedding,
)


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
    _wrap_load_state_dict()
    optimizers[FrequencySGD] = FrequencyConfig()


def _wrap_kernel(
    lookup: type[Any], *, fused: type[Any], dense: type[Any], arguments: Sequence[str]
) -> None:
    stock = lookup._create_embedding_kernel
    signature = inspect.signature(stock)
    kernels = {EmbeddingComputeKernel.FUSED: fused, EmbeddingComputeKernel.DENSE: dense}

    @functools.wraps(stock)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if not _is_frequency(given["config"].fused_params):
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
        tables = _find_tables(given["module"], given.get("fused_params") or {})
        if not tables:
            stock_init(self, *args, **kwargs)
            return
        _refuse(tables, plan, given["env"])
        if "use_index_dedup" in signature.parameters and (
            given.get("use_index_dedup") or get_ec_index_dedup()
        ):
            _refuse_index_dedup(tables)
        # nn.Module's own __setattr__ does not work before its __init__.
        handle = FrequencyTables(tables, given["env"].process_group)
        self.__dict__[_TABLES] = handle
        stock_init(self, *args, **kwargs)
        for lookup in self._lookups:
            if isinstance(lookup, DistributedDataParallel) and _kernels([lookup]):
                lookup.register_comm_hook(handle.process_group, average_and_apply)

    @functools.wraps(stock_lookups)
    def create_lookups(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_lookups(self, *args, **kwargs)
        handle = self.__dict__.get(_TABLES)
        if handle is not None:
            handle.attach(_local_shards(self._lookups, handle.rank), self._device)
            for kernel in _kernels(self._lookups):
                kernel.fused_optimizer.tables = handle

    def update_shards(self: Any, *args: Any, **kwargs: Any) -> None:
        handle = self.__dict__.get(_TABLES)
        if handle is None:
            stock_update(self, *args, **kwargs)
            return
        # TorchRec would move our state as if it were a row-wise Adagrad's.
        states = {name: handle.read(name) for name in handle.tables}
        handle.moving = True
        try:
            stock_update(self, *args, **kwargs)
        finally:
            handle.moving = False
        for name, state in states.items():
            handle.load(name, state)

    for name in ("compute_and_output_dist", "output_dist"):
        setattr(sharded, name, _watched(getattr(sharded, name)))
    sharded.__init__ = init
    sharded._create_lookups = create_lookups
    if stock_update is not None:
        sharded.update_shards = functools.wraps(stock_update)(update_shards)


def _local_shards(lookups: list[nn.Module], rank: int) -> list[LocalShard]:
    """This rank's shards of our tables in freshly made ``lookups``."""
    shards = []
    for kernel in _kernels(lookups):
        group, learning_rate = kernel.frequency_group, kernel.emb_module.get_learning_rate
        for index, config in enumerate(kernel.config.embedding_tables):
            if config.local_metadata is None:  # data parallel: whole on every rank
                row_offset, primary = 0, rank == 0
            else:
                row_offset, column_offset = config.local_metadata.shard_offsets
                primary = column_offset == 0
            shards.append(LocalShard(config.name, row_offset, primary, group, index, learning_rate))
    return shards


def _kernels(lookups: list[nn.Module]) -> list[Any]:
    return [m for lookup in lookups for m in lookup.modules() if isinstance(m, _KERNEL_TYPES)]


def _watched(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method that ends a forward, with the tensors of its output handed to our tables.

    A forward hook would miss modules around the collection, such as feature processors and
    zero-collision hashing, and pipelines, which call these methods instead of the module.
    """

    @functools.wraps(stock)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        handle = self.__dict__.get(_TABLES)
        if handle is not None and torch.is_grad_enabled():
            # It comes when somebody waits for it.
            output.callbacks.append(functools.partial(_watch, handle))
        return output

    return run


@torch.compiler.disable(reason=NOT_COMPILED)
def _watch(handle: FrequencyTables, output: Any) -> Any:
    if isinstance(output, KeyedTensor):
        whole = Output(tuple(output.keys()), tuple(output.length_per_key()))
        outputs = [(output.values(), whole)]
    else:
        values = {name: part.values() for name, part in output.items()}
        outputs = [(part, Output((name,), (part.shape[1],))) for name, part in values.items()]
    handle.watch(outputs, 1 / handle.ranks if get_gradient_division() else 1.0)
    return output


def _wrap_load_state_dict() -> None:
    """TorchRec refuses a state without our counters by its size; we say what to do."""
    stock = KeyedOptimizer.load_state_dict

    @functools.wraps(stock)
    def load_state_dict(self: KeyedOptimizer, state_dict: Mapping[str, Any]) -> None:
        missing = []
        states = self.state  # a combined optimizer merges those of its parts at each access
        for key, weight in self.params.items():
            for name in states.get(weight, ()):
                table, _, state = name.rpartition(".")
                if state == ROW_COUNTER and name not in state_dict["state"].get(key, ()):
                    missing.append(table)
        if missing:
            raise ValueError(
                f"The optimizer state has no row counters of {', '.join(map(repr, missing))}: it "
                "is not one of FrequencySGD. Load the model's weights without it, then either "
                "seed the counts, torchrec_freq.load_row_counts(model, counts, steps), or start "
                "from zero by doing nothing."
            )
        stock(self, state_dict)

    KeyedOptimizer.load_state_dict = load_state_dict


def _find_tables(module: Any, shared: Mapping[str, Any]) -> list[Table]:
    """The tables of an unsharded collection that opted in."""
    parameters = dict(module.named_parameters())
    if hasattr(module, "embedding_bag_configs"):
        configs, prefix = module.embedding_bag_configs(), "embedding_bags"
    else:
        configs, prefix = module.embedding_configs(), "embeddings"
    tables = []
    for config, outputs in zip(configs, get_embedding_names_by_table(configs), strict=True):
        params = _resolve(parameters.get(f"{prefix}.{config.name}.weight"), shared)
        if not _is_frequency(params):
            continue
        frequency = pop_config(params, params.pop("optimizer"))
        foreign = [name for name in _FOREIGN_OPTIONS if name in params]
        if foreign:
            raise ValueError(
                f"Table {config.name!r}: FrequencySGD has no {', '.join(foreign)}; FBGEMM would "
                "ignore it. Take it out of the fused params."
            )
        tables.append(Table(config.name, config.num_embeddings, frequency, tuple(outputs)))
    return tables


def trains_with_frequency(parameter: Any, shared: Mapping[str, Any] | None) -> bool:
    """Whether an unsharded table will train with FrequencySGD under a sharder's fused params."""
    return _is_frequency(_resolve(parameter, shared or {}))


@contextlib.contextmanager
def without_optimizer(parameters: Iterable[Any]) -> Iterator[None]:
    """Hides the optimizer classes of unsharded tables, which TorchRec's planner looks at."""
    hidden = [(p, p._optimizer_classes) for p in parameters if hasattr(p, "_optimizer_classes")]
    for parameter, _ in hidden:
        parameter._optimizer_classes = [None]
    try:
        yield
    finally:
        for parameter, classes in reversed(hidden):
            parameter._optimizer_classes = classes


def _resolve(parameter: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Fused params of an unsharded table, by TorchRec's order of precedence."""
    own = getattr(parameter, "_optimizer_kwargs", [{}])[0]
    params = {**shared, **own}
    for optimizer in getattr(parameter, "_optimizer_classes", []):
        if "optimizer" not in own:
            params["optimizer"] = torchrec_utils._OPTIMIZER_CLASS_TO_EMB_OPT_TYPE.get(optimizer)
    return params


def _refuse(tables: list[Table], plan: Mapping[str, ParameterSharding], env: Any) -> None:
    """Refuses, on every rank alike, what the engine cannot do exactly.

    Raises:
        ValueError: names the table, what it asked for, and what to use instead.
    """
    if isinstance(env, ShardingEnv2D):
        raise ValueError(
            "FrequencySGD does not support 2D parallelism (DMPCollection): it averages the "
            "optimizer state of its replicas, and counts must be summed. Use "
            "DistributedModelParallel."
        )
    for table in tables:
        sharding = plan[table.name]
        replicated = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        kernels = (EmbeddingComputeKernel.DENSE.value,) if replicated else _KERNELS
        if sharding.compute_kernel not in kernels:
            raise ValueError(
                f"Table {table.name!r}: FrequencySGD does not run on compute kernel "
                f"{sharding.compute_kernel!r} under {sharding.sharding_type}. Constrain the "
                f"planner: ParameterConstraints(compute_kernels=[...]) with {', '.join(kernels)}."
            )


def _refuse_index_dedup(tables: list[Table]) -> None:
    """Refuses what needs every lookup where TorchRec looks up each id of a batch once.

    Raises:
        ValueError: names the table and the settings that do without.
    """
    for table in tables:
        if table.config.count == "samples" or table.config.normalize is not None:
            raise ValueError(
                f"Table {table.name!r}: use_index_dedup merges the occurrences of an id, which "
                f"count={table.config.count!r} with normalize={table.config.normalize!r} must "
                "see. Shard without it, or use count='batches' (or 'frozen') and normalize=None."
            )


def _is_frequency(params: Mapping[str, Any] | None) -> bool:
    return isinstance((params or {}).get("optimizer"), FrequencyConfig)


def _split(config: GroupedEmbeddingConfig) -> tuple[GroupedEmbeddingConfig, FrequencyConfig]:
    """A copy of ``config`` that the stock kernel accepts, and what it does not."""
    params = dict(config.fused_params or {})
    frequency = pop_config(params, params.pop("optimizer"))
    stock = copy.copy(config)
    stock.fused_params = {**params, "optimizer": EmbOptimType.EXACT_SGD}
    return stock, frequency
