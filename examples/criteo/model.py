"""The sharded model of a run, its optimizers, and what it starts from."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, INT_FEATURE_COUNT
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from benchmarks.common.ranks import from_first
from benchmarks.common.training import FUSED_TYPES, OPTIMIZERS, SHARDING_TYPES, Training, shard
from examples.criteo.refusal import together
from examples.criteo.settings import Optimizer, Settings
from torchrec_freq import load_counts, load_row_counts
from torchrec_freq.planner import make_planner

GB: Final = 1 << 30


def build(settings: Settings, rows: Sequence[int], device: torch.device) -> Training:
    """Shards a DLRM over the ranks. All ranks must call it.

    Raises:
        ValueError: no plan fits, or the file of counts is of other tables.
    """
    config = settings.model
    tables = [
        EmbeddingBagConfig(count, config.dim, name=name, feature_names=[name])
        for name, count in zip(DEFAULT_CAT_NAMES, rows, strict=True)
    ]
    for table in tables:
        if config.fp16_from is not None and table.num_embeddings >= config.fp16_from:
            table.data_type = DataType.FP16
    # Of the dense layers, which are rank 0's on all, and of each rank's shards.
    torch.manual_seed(settings.seed * dist.get_world_size() + dist.get_rank())
    dlrm = DLRM(
        # Tables get their memory where they are sharded: they need not fit into one rank's.
        EmbeddingBagCollection(tables, device=torch.device("meta")),
        dense_in_features=INT_FEATURE_COUNT,
        dense_arch_layer_sizes=[*config.bottom, config.dim],
        over_arch_layer_sizes=[*config.top, 1],
    )
    options = {"lr": settings.optimizer.lr}
    if settings.optimizer.name == "FrequencySGD":
        options |= asdict(settings.optimizer.frequency)
    optimizer = OPTIMIZERS[settings.optimizer.name]
    apply_optimizer_in_backward(optimizer, dlrm.sparse_arch.parameters(), options)
    counts = None
    if (file := settings.planner.counts) is not None:
        with together():
            counts = read_counts(file, tables)
    module = DLRMTrain(dlrm)
    plan = make_plan(settings, module, tables, counts, device)
    training = shard(module, tables, plan, device, settings.optimizer.dense_lr)
    if counts is not None and settings.optimizer.frequency.count == "frozen":
        load_row_counts(training.model, counts)
    return training


def set_rates(training: Training, settings: Optimizer, step: int) -> float:
    """Sets the learning rates of a step, counted from 0, and returns that of the tables.

    It depends on nothing but the step, so a resumed run needs no state for it.
    """
    factor = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    for group in training.model.fused_optimizer.param_groups:
        group["lr"] = factor * settings.lr
    for group in training.dense_optimizer.param_groups:
        group["lr"] = factor * settings.dense_lr
    return factor * settings.lr


def read_counts(path: Path, tables: Sequence[EmbeddingBagConfig]) -> dict[str, Tensor]:
    """A file of counts of all tables.

    Raises:
        ValueError, OSError: the file cannot be read, or is of other tables.
    """
    counts = dict(load_counts(path).counts)
    expected = {table.name: table.num_embeddings for table in tables}
    found = {name: len(values) for name, values in counts.items()}
    if found != expected:
        raise ValueError(
            f"{path} has counts of other tables than the model. Rows by table there: "
            f"{found}; here: {expected}. Count again, with --table-names '{{column}}' and --rows."
        )
    return counts


def make_plan(
    settings: Settings,
    module: DLRMTrain,
    tables: Sequence[EmbeddingBagConfig],
    counts: dict[str, Tensor] | None,
    device: torch.device,
) -> ShardingPlan:
    """The plan of rank 0, on every rank.

    Raises:
        ValueError: there is none; what the planner said.
    """
    options, ranks = settings.planner, dist.get_world_size()
    types = SHARDING_TYPES if settings.optimizer.name == "FrequencySGD" else FUSED_TYPES
    constraints = {
        table.name: ParameterConstraints(
            # DDP would average in fp16, in which gradients of a large batch lose small elements.
            sharding_types=options.sharding
            or (types if table.data_type == DataType.FP32 else FUSED_TYPES),
            compute_kernels=options.kernels,
        )
        for table in tables
    }
    stats = EmbeddingStats()
    planner = make_planner(
        Topology(
            world_size=ranks,
            local_world_size=get_local_size(),
            compute_device=device.type,
            hbm_cap=None if options.hbm_gb is None else int(options.hbm_gb * GB),
            ddr_cap=None if options.ddr_gb is None else int(options.ddr_gb * GB),
        ),
        settings.batch_size // ranks,
        constraints,
        counts=counts,
        stats=stats,
    )
    plan = None
    with together():
        if dist.get_rank() == 0:
            try:
                plan = planner.plan(module, [EmbeddingBagCollectionSharder()])
            except (PlannerError, RuntimeError) as error:  # of its search, and before it
                raise ValueError(f"No plan fits the planner's settings: {error}") from error
            if options.report:
                print("\n".join(stats._stats_table), flush=True)
    plan = from_first(plan)
    assert plan is not None
    return plan
