"""Which tables opt in, with which settings, and what is refused before anything is built.

TorchRec maps the class that a table's parameter names to the ``"optimizer"`` entry of its fused
params. For ``FrequencySGD`` that entry is a ``FrequencyConfig``: no stock kernel accepts it, so a
path that is not covered here fails instead of training with another rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
import torchrec.distributed.utils as torchrec_utils
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    ParameterSharding,
    ShardingStrategy,
    ShardingType,
)
from typing_extensions import Unpack

from torchrec_freq.config import (
    FrequencyConfig,
    Options,
    check_learning_rate,
    make_config,
    pop_config,
)
from torchrec_freq.sharded.tables import Table

_KERNELS: Final = (
    EmbeddingComputeKernel.FUSED.value,
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
)
# Options of row-wise Adagrad that FBGEMM's kernel honours on a GPU, and ignores on a CPU.
_GPU_OPTIONS: Final = (
    "gradient_clipping",
    "max_gradient",
    "max_norm",
    "weight_decay",
    "weight_decay_mode",
)
# Options of other fused optimizers, or of row-wise Adagrad's own counters.
_FOREIGN_OPTIONS: Final = (
    "beta1",
    "beta2",
    "eta",
    "momentum",
    "counter_based_regularization",
    "cowclip_regularization",
    "global_weight_decay",
    "optimizer_state_dtypes",
)


def fused_params(lr: float, **options: Unpack[Options]) -> dict[str, Any]:
    """Fused params that opt in all tables of a sharder.

    >>> from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    >>> sharder = EmbeddingBagCollectionSharder(fused_params=fused_params(lr=0.05))

    Args:
        lr: learning rate, at least 0.
        options: those of :class:`torchrec_freq.FrequencyConfig`.

    Returns:
        A dict to which FBGEMM's own fused params can be added.

    Raises:
        ValueError: a wrong value, or an option that is unknown or was removed.
    """
    return {"optimizer": make_config(options), "learning_rate": check_learning_rate(lr)}


def is_frequency(params: Mapping[str, Any] | None) -> bool:
    """Whether fused params opt in."""
    return isinstance((params or {}).get("optimizer"), FrequencyConfig)


def trains_with_frequency(parameter: Any, shared: Mapping[str, Any] | None) -> bool:
    """Whether an unsharded table will train with FrequencySGD under a sharder's fused params."""
    return is_frequency(_resolve(parameter, shared or {}))


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


def find_tables(
    module: Any,
    shared: Mapping[str, Any],
    plan: Mapping[str, ParameterSharding],
    env: Any,
    device: torch.device | None,
) -> list[Table]:
    """The tables of an unsharded collection that opted in; refuses, on every rank alike.

    Args:
        shared: the sharder's fused params.
        plan: by table.
        env: TorchRec's sharding environment.
        device: where the tables will be.

    Raises:
        ValueError: what the engine cannot do exactly; names the table, what it asked for, and what
            to use instead.
    """
    parameters = dict(module.named_parameters())
    if hasattr(module, "embedding_bag_configs"):
        configs, prefix = module.embedding_bag_configs(), "embedding_bags"
    else:
        configs, prefix = module.embedding_configs(), "embeddings"
    tables = []
    for config in configs:
        parameter = parameters.get(f"{prefix}.{config.name}.weight")
        params = _resolve(parameter, shared)
        if not is_frequency(params):
            continue
        frequency = pop_config(params, params.pop("optimizer"))
        _refuse(config.name, plan.get(config.name), env, parameter)
        sharding = plan[config.name]
        _refuse_options(config.name, params, frequency, sharding, device)
        shards = getattr(sharding.sharding_spec, "shards", None) or []
        columns = sorted({(s.shard_offsets[1], s.shard_sizes[1]) for s in shards})
        tables.append(
            Table(
                name=config.name,
                rows=config.num_embeddings,
                columns=config.embedding_dim,
                config=frequency,
                widths=tuple(width for _, width in columns) if len(columns) > 1 else (),
                split=len(shards) > 1 and len(set(sharding.ranks or [])) > 1,
                reset=config.init_fn,
            )
        )
    return tables


def _refuse_options(
    name: str,
    params: Mapping[str, Any],
    frequency: FrequencyConfig,
    sharding: ParameterSharding,
    device: torch.device | None,
) -> None:
    if foreign := [option for option in _FOREIGN_OPTIONS if option in params]:
        raise ValueError(
            f"Table {name!r}: FrequencySGD has no {', '.join(foreign)}; FBGEMM would ignore it, or "
            "apply another rule. Where it is meant for other tables, take it out of the sharder's "
            "fused_params and name their optimizer by parameter, as in "
            "apply_optimizer_in_backward(Adam, table.parameters(), {'betas': (0.9, 0.99)})."
        )
    if not (of_gpu := [option for option in _GPU_OPTIONS if params.get(option)]):
        return
    reason = None
    if device is None or device.type != "cuda":
        reason = "FBGEMM's kernel ignores it on this device"
    elif sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        reason = "data-parallel tables do not have it"
    elif frequency.normalize is None or frequency.admit > 1:
        reason = "it needs normalize='table' and admit=1"
    if reason:
        raise ValueError(f"Table {name!r}: {', '.join(of_gpu)}: {reason}. Take it out.")


def refuse_index_dedup(tables: Iterable[Table]) -> None:
    """Refuses what needs every lookup where TorchRec looks up each id of a batch once.

    Raises:
        ValueError: names the table and what to do.
    """
    for table in tables:
        if table.config.count == "samples":
            raise ValueError(
                f"Table {table.name!r}: use_index_dedup merges the occurrences of an id, which "
                "FrequencySGD counts. Shard without it."
            )


def _resolve(parameter: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Fused params of an unsharded table, by TorchRec's order of precedence."""
    own = getattr(parameter, "_optimizer_kwargs", [{}])[0]
    params = {**shared, **own}
    for optimizer in getattr(parameter, "_optimizer_classes", []):
        if "optimizer" not in own:
            params["optimizer"] = torchrec_utils._OPTIMIZER_CLASS_TO_EMB_OPT_TYPE.get(optimizer)
    return params


def _refuse(name: str, sharding: ParameterSharding | None, env: Any, parameter: Any) -> None:
    strategy = getattr(env, "sharding_strategy", None)
    if strategy == ShardingStrategy.FULLY_SHARDED:
        raise ValueError(
            f"Table {name!r}: FrequencySGD does not run under {strategy}, whose kernels average "
            "the weights within a step. Use ShardingStrategy.DEFAULT or PER_MODULE."
        )
    if sharding is None:
        raise ValueError(f"Table {name!r} has no place in the sharding plan: plan the model anew.")
    if not getattr(parameter, "requires_grad", True):
        raise ValueError(
            f"Table {name!r} has requires_grad=False, but fused tables train in every backward. "
            "Name no optimizer for it, in its parameter or in the sharder's fused_params."
        )
    replicated = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    kernels = (EmbeddingComputeKernel.DENSE.value,) if replicated else _KERNELS
    if sharding.compute_kernel not in kernels:
        raise ValueError(
            f"Table {name!r}: FrequencySGD does not run on compute kernel "
            f"{sharding.compute_kernel!r} under {sharding.sharding_type}. Constrain the "
            f"planner: ParameterConstraints(compute_kernels=[...]) with {', '.join(kernels)}."
        )
