"""The sharded model of a run, its optimizers, and its first weights."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, INT_FEATURE_COUNT
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardedTensor, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from benchmarks.common.ranks import from_first
from benchmarks.common.training import FUSED_TYPES, OPTIMIZERS, SHARDING_TYPES, Training, shard
from examples.criteo.refusal import together
from examples.criteo.settings import Model, Optimizer, Settings
from torchrec_freq import CountsFile, load_counts, load_row_counts
from torchrec_freq.planner import FrequencyStats, make_planner

GB: Final = 1 << 30
BLOCK: Final = 1 << 16  # rows that are drawn at once


def build(settings: Settings, rows: Sequence[int], device: torch.device) -> Training:
    """Shards the tables over the ranks. All ranks must call it.

    Raises:
        ValueError: no plan fits, or the file of counts is of other tables.
    """
    tables = make_tables(settings.model, rows)
    # Tables get their memory where they are sharded: they need not fit into one rank's.
    collection = EmbeddingBagCollection(tables, device=torch.device("meta"))
    torch.manual_seed(settings.seed)  # of the dense layers
    module = DLRMTrain(make_dlrm(settings.model, collection))
    options = {"lr": settings.optimizer.lr}
    if settings.optimizer.name == "FrequencySGD":
        options |= asdict(settings.optimizer.frequency)
    apply_optimizer_in_backward(
        OPTIMIZERS[settings.optimizer.name], collection.parameters(), options
    )
    file, counts = settings.planner.counts, None
    if file is not None:
        with together():
            counts = read_counts(file, tables)
    plan = make_plan(settings, module, tables, counts, device)
    training = shard(module, tables, plan, device, settings.optimizer.dense_lr)
    draw_tables(training.model, tables, settings.seed)
    if counts is not None and settings.optimizer.frequency.count == "frozen":
        load_row_counts(training.model, *counts)
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


def make_tables(model: Model, rows: Sequence[int]) -> list[EmbeddingBagConfig]:
    """One table a feature, named as it."""
    tables = [
        EmbeddingBagConfig(count, model.dim, name=name, feature_names=[name])
        for name, count in zip(DEFAULT_CAT_NAMES, rows, strict=True)
    ]
    for table in tables:
        if model.fp16_from is not None and table.num_embeddings >= model.fp16_from:
            table.data_type = DataType.FP16
    return tables


def make_dlrm(model: Model, collection: EmbeddingBagCollection) -> DLRM:
    common = {
        "embedding_bag_collection": collection,
        "dense_in_features": INT_FEATURE_COUNT,
        "dense_arch_layer_sizes": [*model.bottom, model.dim],
        "over_arch_layer_sizes": [*model.top, 1],
    }
    if model.kind == "DLRM":
        return DLRM(**common)
    return DLRM_DCN(**common, dcn_num_layers=model.dcn_layers, dcn_low_rank_dim=model.dcn_rank)


def read_counts(path: Path, tables: Sequence[EmbeddingBagConfig]) -> CountsFile:
    """A file of counts of all tables.

    Raises:
        ValueError, OSError: the file cannot be read, or is of other tables.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of counts.")
    file = load_counts(path)
    expected = {table.name: table.num_embeddings for table in tables}
    found = {name: len(counts) for name, counts in file.counts.items()}
    if found != expected:
        raise ValueError(
            f"{path} has counts of other tables than the model. Rows by table there: "
            f"{found}; here: {expected}. Count again, with --table-names '{{column}}' and --rows."
        )
    return file


def make_plan(
    settings: Settings,
    module: DLRMTrain,
    tables: Sequence[EmbeddingBagConfig],
    counts: CountsFile | None,
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
    stats = FrequencyStats()
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
        counts=None if counts is None else counts.counts,
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


@torch.no_grad()
def draw_tables(
    model: DistributedModelParallel, tables: Sequence[EmbeddingBagConfig], seed: int
) -> None:
    """Draws the tables' weights, uniform within 1 / sqrt(rows) of 0 as TorchRec has it.

    Each block of rows has a seed of its own, so the weights do not depend on plan and ranks.
    """
    state = model.state_dict()
    keys = {key.split(".")[-2]: key for key in state if "embedding_bags." in key}
    generator = torch.Generator(model.device)
    for number, table in enumerate(tables):
        rows, bound = table.num_embeddings, table.num_embeddings**-0.5
        for tensor, first_row, first_column in _shards(state[keys[table.name]]):
            last_row = first_row + tensor.shape[0]
            columns = slice(first_column, first_column + tensor.shape[1])
            for start in range(first_row - first_row % BLOCK, last_row, BLOCK):
                entropy = np.random.SeedSequence([seed, number, start])
                generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
                block = torch.empty(
                    min(BLOCK, rows - start), table.embedding_dim, device=model.device
                ).uniform_(-bound, bound, generator=generator)
                low, high = max(start, first_row), min(start + BLOCK, last_row)
                tensor[low - first_row : high - first_row].copy_(
                    block[low - start : high - start, columns]
                )


def _shards(table: Tensor | ShardedTensor) -> list[tuple[Tensor, int, int]]:
    """This rank's parts of a table, each with its first row and column."""
    if not isinstance(table, ShardedTensor):
        return [(table, 0, 0)]  # data-parallel
    return [(shard.tensor, *shard.metadata.shard_offsets) for shard in table.local_shards()]
