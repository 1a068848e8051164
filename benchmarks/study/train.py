"""One run: a sharded model, an optimizer of its tables, and the figures along the way."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.optimizers import Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.common.training import OPTIMIZERS, Training, shard_alike
from benchmarks.study import ablation
from benchmarks.study.config import AFTER, CLIPPED, ROWWISE, STREAM, Run
from benchmarks.study.data import Dataset, load
from torchrec_freq import load_row_counts

ARMS = {
    **OPTIMIZERS,
    "ClippedRowWiseAdagrad": RowWiseAdagrad,  # and what `ablation` does to its sums
    "Adam": Adam,  # FBGEMM has it on CUDA only
}
EMBEDDING_DIM = 16
FIRST = 5  # lr is chosen on this first part of the stream, a fifth; the rest is judged
PARTS = 10  # points of the curve along the stream

Predicted = Sequence[tuple[Tensor, Tensor]]
"""One entry a step: logits and labels of its batch, each [samples], before the step's update."""


class FM(nn.Module):
    """Factorization machine over the embeddings and a linear image of the dense features.

    The image's constant part gives the linear terms. TorchRec's own `FactorizationMachine` sums the
    columns before it squares, which is another model.
    """

    def __init__(self, tables: EmbeddingBagCollection, dense: int) -> None:
        super().__init__()
        self.embeddings = tables
        self.dense = nn.Linear(dense, EMBEDDING_DIM)
        self.bias = nn.Parameter(torch.zeros(()))
        for table in tables.parameters():
            nn.init.normal_(table, std=0.01)  # TorchRec's 1 / sqrt(rows) is large for small tables

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        pooled = self.embeddings(sparse).values().unflatten(1, (-1, EMBEDDING_DIM))
        vectors = torch.cat([self.dense(dense).unsqueeze(1), pooled], dim=1)
        pairs = (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)).sum(dim=1) / 2
        logits: Tensor = pairs + self.bias
        return logits


def deepfm(tables: EmbeddingBagCollection, dense: int) -> nn.Module:
    model: nn.Module = SimpleDeepFMNN(dense, tables, hidden_layer_size=32, deep_fm_dimension=32)
    # In place of the sigmoid: logits, as of the others.
    model.get_submodule("over_arch.model").register_module("1", nn.Identity())
    return model


MODELS: dict[str, Callable[[EmbeddingBagCollection, int], nn.Module]] = {
    "FM": FM,
    "DeepFM": deepfm,
    "DLRM": lambda tables, dense: DLRM(tables, dense, [32, EMBEDDING_DIM], [64, 32, 1]),
}


def build(run: Run, data: Dataset) -> Training:
    """The model of a run: sharded on one rank, the same weights for every arm and lr."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(run.seed)
    tables = [
        EmbeddingBagConfig(rows, EMBEDDING_DIM, name=f"t_{feature}", feature_names=[feature])
        for feature, rows in data.tables.items()
    ]
    collection = EmbeddingBagCollection(tables)
    module = DLRMTrain(MODELS[run.model](collection, data.dense))
    options, lr = dict(run.arm.options), run.lr
    if run.arm == CLIPPED:
        lr = ablation.kernel_lr(lr, options.pop("own_weight"))
    apply_optimizer_in_backward(
        ARMS[run.arm.optimizer], collection.parameters(), {"lr": lr, **options}
    )

    training = shard_alike(module, tables, device)
    if options.get("count") == "frozen":
        counts = {f"t_{name}": count for name, count in data.counts().items()}
        load_row_counts(training.model, counts)
    if run.arm == CLIPPED:
        ablation.keep_sums(training.model, **run.arm.options)
    return training


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Trains, and returns the run's line of the results file.

    Its "measures" have, for each measure of the experiment, the AUC by which lr is chosen ("by")
    and the figures that are judged. Where a loss is no number the run ends, and measures after that
    are missing. A stream's "curve" is AUC by steps.
    """
    data = load(run.data, folder)
    training = build(run, data)
    result = run.key() | (_stream if data.in_time else _epochs)(run, data, training)
    if run.arm == ROWWISE:
        result["squares"] = _squares_by_count(training, data)
    return result


def _stream(run: Run, data: Dataset, training: Training) -> dict[str, Any]:
    """Predict-then-train over the stream, then the samples after it."""
    predicted = []
    for batch in data.train(run.batch_size, run.seed):
        step = _step(training, batch)
        if step is None:
            return {"measures": {}}
        predicted.append(step)
    figures = stream_figures(predicted)
    after = {"by": figures["by"], **_evaluate(training, data, "valid", "test")}
    return {"measures": {STREAM: figures, AFTER: after}, "curve": stream_curve(predicted)}


def _epochs(run: Run, data: Dataset, training: Training) -> dict[str, Any]:
    """Shuffled epochs: lr is chosen on the validation split, the test split is judged."""
    measures: dict[str, dict[str, float]] = {}
    for epoch in range(run.epochs):
        for batch in data.train(run.batch_size, 1000 * run.seed + epoch):
            if _step(training, batch) is None:
                return {"measures": measures}
        chosen_by = {"by": _evaluate(training, data, "valid")["auc"]}
        measures[f"epoch {epoch + 1}"] = chosen_by | _evaluate(training, data, "test")
    return {"measures": measures}


def stream_figures(steps: Predicted) -> dict[str, float]:
    """AUC over the first fifth of the steps ("by"), AUC and log loss over the others."""
    first = max(1, round(len(steps) / FIRST))
    loss = binary_cross_entropy_with_logits(*_join(steps[first:]))
    rest = {"auc": _auc(steps[first:]), "log_loss": round(float(loss), 6)}
    return {"by": _auc(steps[:first]), **rest}


def stream_curve(steps: Predicted) -> list[tuple[int, float]]:
    """(steps so far, AUC over the last of `PARTS` equal parts), along the stream."""
    ends = [len(steps) * part // PARTS for part in range(PARTS + 1)]
    return [(b, _auc(steps[a:b])) for a, b in zip(ends, ends[1:], strict=False) if a < b]


def _auc(steps: Predicted) -> float:
    logits, labels = _join(steps)
    return round(float(binary_auroc(logits, labels.int())), 6)


def _join(steps: Predicted) -> tuple[Tensor, Tensor]:
    logits, labels = zip(*steps, strict=True)
    return torch.cat(logits), torch.cat(labels).float()


def _step(training: Training, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """One step; logits and labels of the batch before it, None where the loss is no number."""
    loss, (_, logits, labels) = training.step(batch.to(training.model.device))
    return (logits.cpu(), labels.cpu()) if loss.isfinite() else None


def _evaluate(training: Training, data: Dataset, *splits: str) -> dict[str, float]:
    device = training.model.device
    batches = [(batch.to(device), rare.to(device)) for batch, rare in data.held_out(*splits)]
    return {name: round(value, 6) for name, value in training.evaluate(batches).items()}


def _squares_by_count(training: Training, data: Dataset) -> list[list[float]]:
    """What row-wise Adagrad has summed up for rows of the largest table, by powers of two of their
    count in an epoch: a line each of the mean count, the 10th, 50th and 90th percentile of the
    sums, and the table's sum times the row's share of the occurrences, as FrequencySGD predicts."""
    name, counts = max(data.counts().items(), key=lambda item: len(item[1]))
    states = training.model.fused_optimizer.state_dict()["state"].values()
    momenta = {key: value for state in states for key, value in state.items()}
    sums = momenta[f"t_{name}.momentum1"].local_shards()[0].tensor.cpu().numpy()
    lines = []
    for power in range(int(counts.max()).bit_length()):
        rows = (counts.numpy() >> power) == 1
        if rows.any():
            mean = float(counts.numpy()[rows].mean())
            predicted = float(sums.sum()) * mean / int(counts.sum())
            lines.append([mean, *np.percentile(sums[rows], (10, 50, 90)).tolist(), predicted])
    return lines
