"""A model with sharded tables: its optimizers, its figures, and what a checkpoint has of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.types import ShardedTensor, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.common.ranks import gather
from torchrec_freq import FrequencySGD

OPTIMIZERS: Final[dict[str, type[torch.optim.Optimizer]]] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "RowWiseAdagrad": RowWiseAdagrad,
    "Adagrad": torch.optim.Adagrad,
}
DENSE_LR: Final = 1e-3
SHARDING_TYPES: Final = [kind.value for kind in ShardingType]
# TorchRec drops other optimizers than FrequencySGD where a table is data-parallel.
FUSED_TYPES: Final = [kind for kind in SHARDING_TYPES if kind != ShardingType.DATA_PARALLEL.value]


class Figures:
    """AUC and log loss over the samples of all ranks, which must make the same calls.

    Args:
        thresholds: of a binned AUC; None: the exact one, which gathers predictions and labels of
            all samples on every rank.
    """

    def __init__(self, device: torch.device, thresholds: int | None = None) -> None:
        # Checking the arguments would wait for the device at each batch.
        self._auc = BinaryAUROC(thresholds=thresholds, validate_args=False).to(device)
        self._rare_auc = BinaryAUROC(ignore_index=-1).to(device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of samples

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, rare: Tensor | None = None) -> None:
        logits = logits.float()
        self._auc.update(logits.sigmoid(), labels.int())
        if rare is not None:
            self._rare_auc.update(logits.sigmoid(), labels.int().where(rare, -1))
        loss = binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
        self._sums += torch.stack([loss, loss.new_tensor(len(labels))])

    def compute(self) -> dict[str, float]:
        dist.all_reduce(self._sums)
        loss, samples = self._sums.tolist()
        figures = {"auc": float(self._auc.compute()), "log_loss": loss / samples}
        if self._rare_auc.update_called:
            figures["rare_auc"] = float(self._rare_auc.compute())
        return figures


@dataclass
class Training:
    """A sharded model with a loss, and what trains it.

    Attributes:
        dense_optimizer: that part of `optimizer` which has no state before its first step.
    """

    model: DistributedModelParallel
    tables: Sequence[EmbeddingBagConfig]
    dense_optimizer: KeyedOptimizerWrapper
    optimizer: CombinedOptimizer  # of the tables and the dense layers

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves and loads; the counters are in the optimizer's."""
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss, and with it logits and labels, of before the update."""
        self.optimizer.zero_grad()
        loss, outputs = self.model(batch)
        loss.backward()  # updates the embedding tables, too
        self.optimizer.step()
        return loss.detach(), outputs

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, Tensor | None]]) -> dict[str, float]:
        """Figures over the batches of all ranks; each comes with a mask of its rare samples."""
        figures = Figures(self.model.device)
        self.model.eval()
        for batch, rare in batches:
            _, (_, logits, labels) = self.model(batch)
            figures.update(logits, labels, rare)
        self.model.train()
        return figures.compute()


def shard(
    module: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    plan: ShardingPlan,
    device: torch.device,
    dense_lr: float = DENSE_LR,
) -> Training:
    """Shards a model whose tables have their optimizer; Adam trains the dense layers."""
    sharders = [EmbeddingBagCollectionSharder()]
    model = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=dense_lr),
    )
    return Training(model, tables, dense, CombinedOptimizer([model.fused_optimizer, dense]))


@torch.no_grad()
def shard_alike(
    module: nn.Module, tables: Sequence[EmbeddingBagConfig], device: torch.device
) -> Training:
    """For a fair comparison: with the module's weights, and no data-parallel table."""
    fused = ParameterConstraints(sharding_types=FUSED_TYPES)
    planner = EmbeddingShardingPlanner(constraints={table.name: fused for table in tables})
    weights = module.state_dict()
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    training = shard(module, tables, plan, device)
    for name, value in training.model.state_dict().items():
        if isinstance(value, ShardedTensor):  # which TorchRec has initialised anew
            for part in value.local_shards():
                area = zip(part.metadata.shard_offsets, part.metadata.shard_sizes, strict=True)
                index = tuple(slice(start, start + size) for start, size in area)
                part.tensor.copy_(weights[name][index])
    return training


def optimizer_bytes(model: DistributedModelParallel) -> int:
    """Memory of the state of the tables' optimizer, over all ranks."""
    states = model.fused_optimizer.state_dict()["state"].values()
    total = sum(
        shard.tensor.nbytes
        for state in states
        for value in state.values()
        if hasattr(value, "local_shards")  # not the few numbers a table
        for shard in value.local_shards()
    )
    return sum(gather(total))
