"""One run: a sharded model, an optimizer of its tables, and the figures along the way."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import Adam, in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from examples.dlrm import DENSE_LR, load_weights
from examples.dlrm import Arm as Training
from examples.study.config import Run
from examples.study.data import Dataset, load
from torchrec_freq import FrequencySGD, load_row_counts

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "RowWiseAdagrad": RowWiseAdagrad,
    "Adam": Adam,  # FBGEMM has it on CUDA only
}
EMBEDDING_DIM = 16
WARMUP = 0.1  # of an epoch
EVALUATIONS = 4  # points of a learning curve in the first epoch; later ones have one


class FM(nn.Module):
    """Factorization machine over the embeddings and a linear image of the dense features.

    The image's constant part gives the linear terms. TorchRec's own `FactorizationMachine` sums
    over the columns before it squares, which is another model; it is in DeepFM.
    """

    def __init__(self, tables: EmbeddingBagCollection, dense: int) -> None:
        super().__init__()
        self.embeddings = tables
        self.dense = nn.Linear(dense, EMBEDDING_DIM)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        pooled = self.embeddings(sparse).values().unflatten(1, (-1, EMBEDDING_DIM))
        vectors = torch.cat([self.dense(dense).unsqueeze(1), pooled], dim=1)
        pairs = (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)).sum(dim=1) / 2
        logits: Tensor = pairs + self.bias
        return logits


def fm(tables: EmbeddingBagCollection, dense: int) -> nn.Module:
    return FM(tables, dense)


def deepfm(tables: EmbeddingBagCollection, dense: int) -> nn.Module:
    model: nn.Module = SimpleDeepFMNN(dense, tables, hidden_layer_size=32, deep_fm_dimension=32)
    # In place of the sigmoid: logits, as of the others.
    model.get_submodule("over_arch.model").register_module("1", nn.Identity())
    return model


def dlrm(tables: EmbeddingBagCollection, dense: int) -> nn.Module:
    model: nn.Module = DLRM(tables, dense, [32, EMBEDDING_DIM], [64, 32, 1])
    return model


MODELS = {"FM": fm, "DeepFM": deepfm, "DLRM": dlrm}


class WithLoss(nn.Module):
    """A model with the loss that it is trained on, as TorchRec's `DLRMTrain`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.BCEWithLogitsLoss()

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = self.loss(logits, batch.labels.float())
        return loss, (loss.detach(), logits.detach(), batch.labels)


def build(run: Run, data: Dataset) -> Training:
    """The model of a run: sharded, and the same weights for every arm, lr and number of ranks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(run.seed)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature}",
            feature_names=[feature],
            num_embeddings=rows,
            embedding_dim=EMBEDDING_DIM,
        )
        for feature, rows in data.tables.items()
    ]
    collection = EmbeddingBagCollection(tables)
    module = WithLoss(MODELS[run.model](collection, data.dense))
    apply_optimizer_in_backward(
        OPTIMIZERS[run.arm.optimizer], collection.parameters(), {"lr": run.lr, **run.arm.options}
    )

    # No table is data-parallel: TorchRec drops SGD and Adagrad there.
    types = [t.value for t in ShardingType if t is not ShardingType.DATA_PARALLEL]
    planner = EmbeddingShardingPlanner(
        constraints={table.name: ParameterConstraints(sharding_types=types) for table in tables}
    )
    sharders = [EmbeddingBagCollectionSharder()]
    weights = module.state_dict()
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    model = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)
    load_weights(model, weights)
    steps = data.steps(run.batch_size)
    if run.arm.options.get("count") == "frozen":
        counts = {f"t_{name}": count for name, count in data.counts.items()}
        load_row_counts(model, counts, steps)

    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=DENSE_LR),
    )
    fused = model.fused_optimizer
    if run.arm.warmup:
        stage = WarmupStage(WarmupPolicy.LINEAR, max_iters=max(1, round(WARMUP * steps)), value=0.0)
        fused = WarmupOptimizer(fused, [stage], lr=run.lr)
    return Training(run.arm.label, run.lr, model, dense, CombinedOptimizer([fused, dense]))


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Trains, and returns the run's line of the results file.

    The curve has the figures on the validation split after each quarter of the first epoch and
    after each epoch, and from the first epoch's end on those on the test split. It ends early where
    the loss is no number any more.
    """
    data = load(run.data, folder)
    assert data is not None, f"{run.data} is not in {folder}"
    training = build(run, data)
    held_out = {split: data.held_out(split) for split in ("valid", "test")}
    steps = data.steps(run.batch_size)
    quarters = {max(1, steps * n // EVALUATIONS) for n in range(1, EVALUATIONS)}
    curve: list[dict[str, Any]] = []
    for epoch in range(run.epochs):
        diverged = False
        for step, batch in enumerate(data.train(run.batch_size, _seed(run, epoch)), start=1):
            loss = training.step(batch.to(training.model.device))
            if diverged := _any_rank(not math.isfinite(loss), training.model.device):
                break
            if epoch == 0 and step in quarters:
                curve.append(_point(step, step / steps, training, {"valid": held_out["valid"]}))
        if diverged:
            break
        curve.append(_point(steps * (epoch + 1), epoch + 1, training, held_out))
    return run.key() | {
        "curve": curve,
        "milliseconds": round(1e3 * statistics.median(training.seconds), 2),
        "ranks": dist.get_world_size(),
    }


def _any_rank(value: bool, device: torch.device) -> bool:
    """Whether it is true on a rank, so that all ranks go the same way."""
    if dist.get_world_size() == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _seed(run: Run, epoch: int) -> int:
    return 1000 * run.seed + epoch


def _point(
    step: int, epoch: float, training: Training, held_out: dict[str, list[tuple[Batch, Tensor]]]
) -> dict[str, Any]:
    figures = {
        split: {name: round(value, 6) for name, value in training.evaluate(batches).items()}
        for split, batches in held_out.items()
    }
    return {"step": step, "epoch": round(epoch, 3), **figures}
