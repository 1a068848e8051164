"""AUC and log loss over the samples of all ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist


@torch.no_grad()
def evaluate(
    pipeline: TrainPipelineSparseDist[Any, Any],
    source: Iterator[Any],
    device: torch.device,
    thresholds: int | None,
    after_batch: Callable[[], None],
) -> dict[str, float]:
    """Figures of a model in evaluation mode. All ranks must call it.

    Args:
        thresholds: see `criteo.config.Evaluation`. The exact AUC gathers predictions and
            labels of all samples on every rank; a binned one has its confusion matrices summed.
        after_batch: called after each batch.
    """
    # Checking the arguments would wait for the device at each batch.
    auc = BinaryAUROC(thresholds=thresholds, validate_args=False).to(device)
    log_loss, samples = torch.zeros(2, dtype=torch.float64, device=device)  # sums
    while (outputs := next_outputs(pipeline, source)) is not None:
        _, logits, labels = outputs
        logits = logits.float()
        auc.update(logits.sigmoid(), labels.int())
        losses = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        log_loss += losses.sum()
        samples += len(losses)
        after_batch()
    sums = torch.stack([log_loss, samples])
    dist.all_reduce(sums)
    return {"auc": float(auc.compute()), "log_loss": float(sums[0] / sums[1])}


def next_outputs(
    pipeline: TrainPipelineSparseDist[Any, Any], source: Iterator[Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Loss, logits and labels of the next batch; None when there is none."""
    try:
        outputs: tuple[Tensor, Tensor, Tensor] = pipeline.progress(source)
    except StopIteration:
        return None
    return outputs
