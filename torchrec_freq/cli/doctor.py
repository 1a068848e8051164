"""Whether training with FrequencySGD works on this machine, and how to repair it where it does not.

Starts communication, then trains a small table under each sharding type and kernel that one process
can run, beside FrequencySGD.step() in plain torch. Exit status 0 where all of that works, 1 where
not. Takes some ten seconds; nothing is changed.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.init import zeros_
from torchrec.distributed import sharding_plan as plans
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq import _versions
from torchrec_freq.cli.terminal import visible
from torchrec_freq.model_state import row_counts
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.sharded.install import ROW_BYTES

HELP: Final = "check this machine: versions, GPU, communication, and a self-test"

_ROWS, _DIM, _BAGS, _STEPS = 50, 256, 16, 8
_SHARDING: Final[dict[str, Any]] = {
    "table-wise": plans.table_wise(rank=0),
    "row-wise": plans.row_wise(),
    "column-wise": plans.column_wise(ranks=[0, 0]),
    "table-row-wise": plans.table_row_wise(host_index=0),
    "grid": plans.grid_shard(host_indexes=[0, 0]),
    "data-parallel": plans.data_parallel(),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = _versions.find()
    gpus = torch.cuda.device_count() if found.fbgemm_build != "cpu" else 0
    device, backend = (torch.device("cuda", 0), "nccl") if gpus else (torch.device("cpu"), "gloo")
    print(f"ok    {found}: they fit each other and can be loaded")
    print(f"ok    {gpus or 'no'} GPUs: training runs on {device.type}, with {backend}")
    print(f"ok    {ROW_BYTES} bytes a row besides the weights: sum and counter, in HBM on a GPU")
    checks: list[tuple[str, partial[str | None]]] = [(backend, partial(_start, device, backend))]
    for sharding in _SHARDING:
        both = gpus and sharding == "table-wise"
        for kernel in ("fused", "fused_uvm", "fused_uvm_caching") if both else ("fused",):
            checks.append((f"{sharding}, {kernel}", partial(_train, device, sharding, kernel)))
    works = True
    for name, check in checks:
        try:
            wrong = check()
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{'FAIL' if wrong else 'ok':5} {name}: {visible(wrong or 'works')}", flush=True)
        works = works and not wrong
        if not dist.is_initialized():
            break
    else:
        dist.destroy_process_group()
    if not works or (found.driver and not gpus):  # the driver of a GPU that is not used
        print("Repair:", *found.repair(), sep="\n  ")
    print("Training works here." if works else "Training would fail here.")
    return 0 if works else 1


def _start(device: torch.device, backend: str) -> str | None:
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device=device))  # NCCL starts with the first collective
    return None


def _train(device: torch.device, sharding: str, kernel: str) -> str | None:
    """Trains some steps, sharded and in plain torch; returns how the results differ, or None."""
    torch.manual_seed(0)
    plain = torch.nn.EmbeddingBag(_ROWS, _DIM, mode="sum", sparse=True)
    zeros_(plain.weight)
    optimizer = FrequencySGD(plain.parameters(), lr=0.1)
    config = EmbeddingBagConfig(_ROWS, _DIM, "t", feature_names=["f"], init_fn=zeros_)
    collection = EmbeddingBagCollection([config])
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": 0.1})
    sharder: Any = EmbeddingBagCollectionSharder()
    plan = plans.construct_module_sharding_plan(
        collection, {"t": _SHARDING[sharding]}, sharder, device_type=device.type
    )
    if sharding != "data-parallel":
        plan["t"].compute_kernel = kernel
    model = DistributedModelParallel(
        collection, device=device, plan=ShardingPlan({"": plan}), sharders=[sharder]
    )

    def look_up(ids_BL: Tensor) -> Tensor:
        lengths_B = torch.full((len(ids_BL),), ids_BL.shape[1])
        features = KeyedJaggedTensor(["f"], ids_BL.flatten(), lengths=lengths_B)
        output_BD: Tensor = model(features.to(device)).values()
        return output_BD.cpu()

    for _ in range(_STEPS):
        ids_BL = torch.randint(_ROWS, (_BAGS, 3)).square() // _ROWS  # skewed
        # Halves that are alike: column shards have the mean squares of whole rows.
        target_BD = torch.randn(_BAGS, _DIM // 2).repeat(1, 2)
        for output_BD in (plain(ids_BL), look_up(ids_BL)):
            (output_BD - target_BD).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if not torch.equal(row_counts(model)["t"], optimizer.state[plain.weight]["row_counter"].long()):
        return "the counts are wrong"
    with torch.no_grad():
        most = float((look_up(torch.arange(_ROWS).unsqueeze(1)) - plain.weight).abs().max())
    return None if most < 1e-5 else f"weights differ by up to {most:.2g}"
