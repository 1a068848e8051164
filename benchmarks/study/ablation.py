r"""What the counts add: row-wise Adagrad with FrequencySGD's weight of the step's own square.

.. math::
    v_i = (A_i + \mathrm{own\_weight} \cdot \mathrm{mean}(g_i^2)) / 2, \qquad
    w_i \leftarrow w_i - \frac{\mathrm{lr}}{\sqrt{v_i}}\, g_i, \qquad
    A_i \leftarrow A_i + \mathrm{mean}(g_i^2)

This is FrequencySGD's step with a sum of squares A_i kept for each row, where FrequencySGD predicts
it from the row's count. No library has it. It runs on FBGEMM's row-wise Adagrad, whose momentum M_i
is held at A_i / own_weight and which divides by sqrt(M_i + mean(g_i^2)): that is `kernel_lr`.
"""

import math
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel


def kernel_lr(lr: float, own_weight: float) -> float:
    return lr * math.sqrt(2 / own_weight)


@torch.no_grad()
def keep_sums(model: DistributedModelParallel, own_weight: float) -> None:
    """Before each forward, of what the last step added to a momentum 1 / `own_weight` is kept."""
    sums = [
        shard.tensor
        for state in model.fused_optimizer.state_dict()["state"].values()
        for value in state.values()
        for shard in value.local_shards()
    ]
    before = [value.clone() for value in sums]

    def keep(*_: Any) -> None:
        for now, past in zip(sums, before, strict=True):
            past.lerp_(now, 1 / own_weight)
            now.copy_(past)

    model.register_forward_pre_hook(keep)
