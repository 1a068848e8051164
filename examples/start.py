"""A first model with FrequencySGD: two tables, trained and saved.

    torchrun --standalone --nproc-per-node 2 examples/start.py

Run again, it goes on from its last checkpoint, on any number of ranks.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_freq
from torchrec_freq import FrequencySGD

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)

# The model: two tables, some dense layers.
torch.manual_seed(0)
rows = {"user": 1000, "item": 5000}
tables = [
    EmbeddingBagConfig(
        name=name, num_embeddings=size, embedding_dim=16, feature_names=[f"{name}_id"]
    )
    for name, size in rows.items()
]
model = DLRM(
    EmbeddingBagCollection(tables=tables, device=device),
    dense_in_features=4,
    dense_arch_layer_sizes=[16, 16],
    over_arch_layer_sizes=[16, 1],
    dense_device=device,
)

# The one line, then sharding as ever.
apply_optimizer_in_backward(FrequencySGD, model.sparse_arch.parameters(), {"lr": 0.05})
model = DistributedModelParallel(model, device=device)
dense_optimizer = KeyedOptimizerWrapper(
    dict(in_backward_optimizer_filter(model.named_parameters())),
    lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
)


def batch(size: int = 64) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """Dense features, ids of which few are frequent, and clicks."""
    ids = [(n ** torch.rand(size)).long() for n in rows.values()]
    features = KeyedJaggedTensor(
        keys=[f"{name}_id" for name in rows],
        values=torch.cat(ids),
        lengths=torch.ones(size * len(rows), dtype=torch.int32),
    )
    clicks = (ids[0] % 3 == ids[1] % 3).float()
    return torch.randn(size, 4).to(device), features.to(device), clicks.to(device)


steps = torch.tensor(0)


def state() -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": model.fused_optimizer.state_dict(),
        "dense_optimizer": dense_optimizer.state_dict(),
        "steps": steps,
    }


# Go on where the last run ended, whatever its ranks and plan. One that has .metadata is whole.
folder = Path("checkpoints")
if saved_steps := [int(whole.parent.name) for whole in folder.glob("*/.metadata")]:
    dense_optimizer.init_state()  # there must be state to load into
    saved = state()
    # The planner is for ranks without a table, at which torch's default fails.
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    dcp.load(saved, checkpoint_id=folder / str(max(saved_steps)), planner=planner)
    model.load_state_dict(saved["model"])
    model.fused_optimizer.load_state_dict(saved["optimizer"])
    dense_optimizer.load_state_dict(saved["dense_optimizer"])

torch.manual_seed(1 + rank + int(steps))  # each rank has samples of its own
losses = []
for _ in range(200):
    dense, features, clicks = batch()
    dense_optimizer.zero_grad()
    logits = model(dense, features).squeeze(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, clicks)
    loss.backward()  # updates the tables
    dense_optimizer.step()
    losses.append(loss.item())

steps += 200
dcp.save(state(), checkpoint_id=folder / str(int(steps)))  # a new folder each time

counts = torchrec_freq.row_counts(model)  # all ranks call it, all get whole tables
if rank == 0:
    lookups = {name: int(table.sum()) for name, table in counts.items()}
    first, last = sum(losses[:50]) / 50, sum(losses[-50:]) / 50
    print(f"{ranks} ranks, loss {first:.3f} to {last:.3f}, lookups so far: {lookups}")
dist.barrier()  # no rank leaves while another still talks to it
dist.destroy_process_group()
