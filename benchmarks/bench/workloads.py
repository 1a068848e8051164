"""What is timed: FBGEMM's tables by themselves, a sharded collection, and the DLRM around it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    CounterBasedRegularizationDefinition,
    LearningRateMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.bench.measure import Step
from benchmarks.common.training import OPTIMIZERS, shard
from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.tbe import FrequencyTBE

LR: Final = 0.01
BASE, OURS = "RowWiseAdagrad", "FrequencySGD"
ZIPF: Final = 1.05
"""The row of rank r (1, 2, ...) is looked up in proportion to r ** -ZIPF."""
BATCHES: Final = 4
"""Different batches that take turns."""
DENSE: Final = 13


@dataclass(frozen=True)
class Shape:
    """Tables of equal size, each read by one feature.

    Attributes:
        batch: samples, of all ranks.
        ids: ids in a bag.
        half: tables of float16; else of float32.
        cached: tables in host memory behind a cache on the GPU; without a GPU it changes nothing.
    """

    tables: int
    rows: int
    dim: int
    batch: int
    ids: int
    half: bool = False
    cached: bool = False

    @property
    def lookups(self) -> int:
        """Of a step, all ranks."""
        return self.tables * self.batch * self.ids

    def __str__(self) -> str:
        flags = ", fp16" * self.half + ", UVM caching" * self.cached
        return f"{self.tables} x {self.rows:,} x {self.dim}, {self.batch:,}, {self.ids}{flags}"


def draw_ids(shape: Shape, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and offsets of bags, feature by feature.

    Args:
        batch: samples.
    """
    generator = torch.Generator().manual_seed(seed)
    bags = shape.tables * batch
    weights = torch.arange(1, shape.rows + 1, dtype=torch.float64) ** -ZIPF
    ranks = torch.multinomial(weights, bags * shape.ids, replacement=True, generator=generator)
    # Frequent rows lie anywhere in their table.
    ids = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(0))[ranks]
    return ids, torch.arange(bags + 1) * shape.ids


Makers = dict[str, Callable[[], Step]]
"""By optimizer, what makes tables and their step."""


def bare_tables(shape: Shape, device: torch.device) -> Makers:
    """FBGEMM's tables; COUNTER_SGD is FBGEMM's own counter mode."""
    drawn = [draw_ids(shape, shape.batch, seed) for seed in range(BATCHES)]
    batches = [(ids.to(device), offsets.to(device)) for ids, offsets in drawn]
    gradient = torch.randn(shape.batch, shape.tables * shape.dim, device=device) * 0.01
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if device.type == "cuda":
        on_gpu = EmbeddingLocation.MANAGED_CACHING if shape.cached else EmbeddingLocation.DEVICE
        place = (on_gpu, ComputeDevice.CUDA)
    specs = [(shape.rows, shape.dim, *place)] * shape.tables
    options: dict[str, Any] = {"learning_rate": LR, "device": device}
    if shape.half:
        options["weights_precision"] = SparseType.FP16
    adagrad, stock = EmbOptimType.EXACT_ROWWISE_ADAGRAD, SplitTableBatchedEmbeddingBagsCodegen
    counter = CounterBasedRegularizationDefinition(learning_rate_mode=LearningRateMode.COUNTER_SGD)
    kinds: dict[str, Callable[[], Any]] = {
        BASE: lambda: stock(specs, optimizer=adagrad, **options),
        OURS: lambda: FrequencyTBE(specs, frequency=FrequencyConfig(), **options),
        "SGD": lambda: stock(specs, optimizer=EmbOptimType.EXACT_SGD, **options),
        "COUNTER_SGD": lambda: stock(
            specs,
            optimizer=adagrad,
            weight_decay_mode=WeightDecayMode.COUNTER,
            counter_based_regularization=counter,
            **options,
        ),
    }

    def make(kind: Callable[[], Any]) -> Step:
        tables = kind()
        return lambda number: tables(*batches[number % BATCHES]).backward(gradient)

    return {name: partial(make, kind) for name, kind in kinds.items()}


def sharded(shape: Shape, device: torch.device, *, dlrm: bool) -> Makers:
    """A collection, or the DLRM around it; all ranks must call it.

    On one rank each table is whole; on several every second one is split by rows.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    names = [f"t{i}" for i in range(shape.tables)]
    local = shape.batch // ranks
    batches = []
    for number in range(BATCHES):
        ids, offsets = draw_ids(shape, local, BATCHES * rank + number)
        features = KeyedJaggedTensor.from_offsets_sync(names, ids, offsets=offsets)
        labels = torch.randint(2, (local,)).float()
        batches.append(Batch(torch.randn(local, DENSE), features, labels).to(device))
    gradient = torch.randn(local, shape.tables * shape.dim, device=device) * 0.01
    plans: dict[str, Callable[..., Any]] = {
        name: row_wise() if ranks > 1 and i % 2 else table_wise(rank=i % ranks)
        for i, name in enumerate(names)
    }

    def make(optimizer: str) -> Step:
        tables = [
            EmbeddingBagConfig(shape.rows, shape.dim, name=name, feature_names=[name])
            for name in names
        ]
        collection = EmbeddingBagCollection(tables, device=torch.device("meta"))
        apply_optimizer_in_backward(OPTIMIZERS[optimizer], collection.parameters(), {"lr": LR})
        sharders = [EmbeddingBagCollectionSharder()]
        plan = construct_module_sharding_plan(
            collection, plans, sharder=sharders[0], device_type=device.type
        )
        if dlrm:
            module = DLRM(
                collection,
                dense_in_features=DENSE,
                dense_arch_layer_sizes=[512, 256, shape.dim],
                over_arch_layer_sizes=[512, 512, 256, 1],
                dense_device=device,
            )
            path = "model.sparse_arch.embedding_bag_collection"
            training = shard(DLRMTrain(module), tables, ShardingPlan({path: plan}), device)
            return lambda number: training.step(batches[number % BATCHES])
        model = DistributedModelParallel(
            collection, device=device, plan=ShardingPlan({"": plan}), sharders=sharders
        )
        return lambda number: (
            model(batches[number % BATCHES].sparse_features).values().backward(gradient)
        )

    return {name: partial(make, name) for name in (BASE, OURS, "SGD")}
