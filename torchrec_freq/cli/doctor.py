"""Whether training with FrequencySGD works on this machine, and what to do where it does not.

Looks at versions, builds, GPU and communication, then trains a small model under each sharding type
and kernel that one process can run, and compares it with the rule in plain torch. Exit status 0
where all of that works, 1 where not. Takes some ten seconds; nothing is changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed import sharding_plan
from torchrec.distributed.embedding_types import EmbeddingComputeKernel as Kernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding, ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq import _versions
from torchrec_freq.cli.terminal import as_json, visible
from torchrec_freq.config import DEFAULT_EPS, DEFAULT_OWN_WEIGHT
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.sharded.counts import row_counts

HELP: Final = "check this machine: versions, GPU, communication, and a self-test"

_NAME: Final = "torchrec-freq"
_PIP: Final = f"{sys.executable} -m pip"
_LR: Final = 0.1
_ROWS, _DIM, _SAMPLES, _IDS, _STEPS = 50, 256, 16, 3, 8
# Column shards are cut at 128 columns at the least, a grid's too.
_SHARDING: Final[dict[str, Callable[[], Any]]] = {
    "table-wise": lambda: sharding_plan.table_wise(rank=0),
    "row-wise": sharding_plan.row_wise,
    "column-wise": lambda: sharding_plan.column_wise(ranks=[0, 0]),
    "table-row-wise": lambda: sharding_plan.table_row_wise(host_index=0),
    "grid": lambda: sharding_plan.grid_shard(host_indexes=[0, 0]),
    "data-parallel": sharding_plan.data_parallel,
}
_CUDA_KERNELS: Final = (Kernel.FUSED_UVM, Kernel.FUSED_UVM_CACHING)


@dataclass(frozen=True)
class Finding:
    """What the doctor says of one thing.

    Attributes:
        state: ``"FAIL"`` where training does not work; ``"note"`` what works less well, or not
            where it is not needed.
        fix: shell commands that help.
    """

    state: Literal["ok", "note", "FAIL"]
    name: str
    text: str
    fix: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = []
    for finding in findings():
        found.append(finding)
        if not arguments.json:
            print(f"{finding.state:4}  {finding.name:14}  {visible(finding.text)}", flush=True)
            for command in finding.fix:
                print(f"{'':20}  $ {command}", flush=True)
    fails = sum(finding.state == "FAIL" for finding in found)
    if arguments.json:
        print(as_json(found))
    else:
        print("Training works here." if not fails else f"Training would fail: {fails} of these.")
    return 1 if fails else 0


def findings() -> Iterator[Finding]:
    """Looks at one thing after the other. Where torch and TorchRec do not fit, there is no doctor:
    importing the package says so."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()}")
    versions = _versions.find()
    yield Finding("ok", "versions", f"{versions}; they fit each other and can be loaded")
    yield _gpu(versions)
    on_gpu = torch.cuda.is_available() and versions.fbgemm_build != "cpu"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    backend = _backend(device)
    yield backend
    if backend.state != "FAIL":
        yield from _self_tests(device, versions)
    yield from _tools()


def _gpu(versions: _versions.Found) -> Finding:
    if not versions.driver:
        return Finding("ok", "GPU", "no NVIDIA driver: training runs on the CPU, with gloo")
    built = f"torch {torch.__version__} built for CUDA {torch.version.cuda or '(none)'}"
    if not torch.cuda.is_available():
        text = f"there is an NVIDIA driver, but {built} sees no GPU: training runs on the CPU"
        fix = _versions.repair(versions, sys.executable, broken=True)
        return Finding("note", "GPU", text, tuple(fix))
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    devices = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    if versions.fbgemm_build != "cpu":
        return Finding("ok", "GPU", f"{devices}; {built}")
    text = f"{devices}; {built}; FBGEMM's CPU build does not use it"
    install = f"install fbgemm-gpu=={versions.fbgemm}"
    return Finding(
        "note", "GPU", text, (f"{_PIP} uninstall -y fbgemm-gpu-cpu", f"{_PIP} {install}")
    )


def _backend(device: torch.device) -> Finding:
    """Starts a process group of this process alone, which stays if it works."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in available.items())
    fix = (f"{_PIP} install --force-reinstall torch=={torch.__version__}",)
    if not available[backend]:
        return Finding("FAIL", "communication", f"{text}; training needs {backend} here", fix)
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1, device=device))  # NCCL starts with the first collective
    except Exception as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        return Finding("FAIL", "communication", f"{text}; {backend} does not start: {error}", fix)
    return Finding("ok", "communication", f"{text}; {backend} starts")


def _self_tests(device: torch.device, versions: _versions.Found) -> Iterator[Finding]:
    """Trains under each sharding type and kernel, compared with the rule in plain torch."""
    cases = [(name, name, Kernel.FUSED) for name in _SHARDING]
    if device.type == "cuda":
        cases += [(f"table-wise, {k.value}", "table-wise", k) for k in _CUDA_KERNELS]
    works, fails = [], []
    for label, sharding, kernel in cases:
        try:
            wrong = _train(device, _SHARDING[sharding], kernel)
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "no reason given")
            wrong = f"{type(error).__name__}: {line}"
        if wrong is None:
            works.append(label)
        else:
            fails.append(f"{label}: {wrong}")
    dist.destroy_process_group()
    on = "the GPU" if device.type == "cuda" else "the CPU"
    if works:
        yield Finding("ok", "self-test", f"on {on} as in plain torch: {', '.join(works)}")
    fix = tuple(_versions.repair(versions, sys.executable, broken=True))
    for failure in fails:
        yield Finding("FAIL", "self-test", f"on {on}, {failure}", fix)
    if device.type == "cpu":
        kernels = ", ".join(kernel.value for kernel in _CUDA_KERNELS)
        yield Finding("ok", "kernels", f"fused; {kernels} need a GPU and are not tested")


def _train(device: torch.device, sharding: Callable[[], Any], kernel: Kernel) -> str | None:
    """Trains some steps; returns how the result differs from the reference, or None."""
    torch.manual_seed(0)
    table = EmbeddingBagConfig(
        name="t", feature_names=["f"], num_embeddings=_ROWS, embedding_dim=_DIM
    )
    collection = EmbeddingBagCollection(tables=[table])
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": _LR})
    sharder = EmbeddingBagCollectionSharder()
    plan = sharding_plan.construct_module_sharding_plan(
        collection, {"t": sharding()}, sharder=sharder, device_type=device.type
    )
    parameter: ParameterSharding = plan["t"]
    if parameter.compute_kernel == Kernel.FUSED.value:
        parameter.compute_kernel = kernel.value
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    model = DistributedModelParallel(
        collection, env=env, device=device, plan=ShardingPlan(plan={"": plan}), sharders=[sharder]
    )
    before_RD = _whole(model)
    ids_SL = torch.randint(_ROWS, (_STEPS, _SAMPLES * _IDS)).square() // _ROWS  # skewed
    target_SBD = torch.randn(_STEPS, _SAMPLES, _DIM)
    lengths_B = torch.full((_SAMPLES,), _IDS)
    for ids_L, target_BD in zip(ids_SL, target_SBD, strict=True):
        features = KeyedJaggedTensor(["f"], ids_L.to(device), lengths=lengths_B.to(device))
        output_BD = model(features).values()
        (output_BD - target_BD.to(device)).square().mean().backward()
    for module in model.modules():
        if hasattr(module, "flush"):  # a cache, to the table
            module.flush()
    columns = parameter.sharding_spec.shards[0].shard_sizes[1] if parameter.sharding_spec else _DIM
    expected_RD, counts_R = _reference(before_RD, ids_SL, target_SBD.double(), _DIM // columns)
    if not torch.equal(row_counts(model)["t"], counts_R):
        return "the counts are wrong"
    most = float((_whole(model) - expected_RD).abs().max())
    return None if most < 1e-5 else f"weights differ by up to {most:.2g}"


@torch.no_grad()
def _whole(model: torch.nn.Module) -> Tensor:
    """float64 [rows, columns]: a copy of the table, all shards of which are here."""
    (value,) = model.state_dict().values()
    whole_RD = torch.zeros(_ROWS, _DIM, dtype=torch.float64)
    if not isinstance(value, ShardedTensor):
        return whole_RD.copy_(value)
    for shard in value.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        whole_RD[row : row + rows, column : column + columns].copy_(shard.tensor)
    return whole_RD


def _reference(
    weight_RD: Tensor, ids_SL: Tensor, target_SBD: Tensor, shards: int
) -> tuple[Tensor, Tensor]:
    """The rule in plain torch and float64, which shares no code with the engine.

    Args:
        shards: of the columns, each of which goes by the squares of its own.

    Returns:
        The weights, and the counts of the rows.
    """
    counts_R, squares = torch.zeros(_ROWS, dtype=torch.int64), 0.0
    for ids_L, target_BD in zip(ids_SL, target_SBD, strict=True):
        weight_RD = weight_RD.detach().requires_grad_()
        output_BD = weight_RD[ids_L].view(_SAMPLES, _IDS, _DIM).sum(dim=1)
        (grad_RD,) = torch.autograd.grad((output_BD - target_BD).square().mean(), weight_RD)
        per_count = squares / max(int(counts_R.sum()), 1)
        counts_R += torch.bincount(ids_L, minlength=_ROWS)
        own_RD = grad_RD.view(_ROWS, shards, -1).square().mean(dim=2)
        own_RD = own_RD.repeat_interleave(_DIM // shards, dim=1)
        root_RD = ((per_count * counts_R.unsqueeze(1) + DEFAULT_OWN_WEIGHT * own_RD) / 2).sqrt()
        weight_RD = weight_RD - _LR / (root_RD + DEFAULT_EPS) * grad_RD
        squares += float(own_RD.mean(dim=1).sum())
    return weight_RD.detach(), counts_R


def _tools() -> Iterator[Finding]:
    """What is needed besides training itself."""
    for extra, names in _extras().items():
        missing = [name for name in names if _versions.metadata_version(name) is None]
        if missing:
            text = f"of the extra {extra!r} missing: {', '.join(missing)}"
            yield Finding("note", "extras", text, (f"{_PIP} install {' '.join(missing)}",))
        else:
            yield Finding("ok", "extras", f"{extra}: {', '.join(names)}")
    if shutil.which("torchrun") is None:
        path = f'export PATH="{os.path.dirname(sys.executable)}:$PATH"'
        yield Finding("note", "torchrun", "not on PATH, where torchx looks for it", (path,))


def _extras() -> dict[str, list[str]]:
    """Extra -> distributions, as the installed package's metadata say; none of bare sources."""
    extras: dict[str, list[str]] = {}
    if _versions.metadata_version(_NAME) is None:
        return extras
    for requirement in importlib.metadata.requires(_NAME) or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] != "dev" and name[0] != _NAME:
            extras.setdefault(extra[1], []).append(name[0])
    return extras
