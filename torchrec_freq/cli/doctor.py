"""Whether training with FrequencySGD works on this machine, and what to do where it does not.

Looks at versions, builds, GPU and communication, then trains a small model under each sharding type
and kernel that one process can run, and compares it with the rule in plain torch. Exit status 0
where all of that works, 1 where not. Takes some ten seconds; nothing is changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed import sharding_plan
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding, ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq import _versions
from torchrec_freq.cli.terminal import visible
from torchrec_freq.config import DEFAULT_EPS, DEFAULT_OWN_WEIGHT
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.sharded.counts import row_counts

HELP: Final = "check this machine: versions, GPU, communication, and a self-test"

_NAME: Final = "torchrec-freq"
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
_CUDA_KERNELS: Final = (
    EmbeddingComputeKernel.FUSED_UVM,
    EmbeddingComputeKernel.FUSED_UVM_CACHING,
)


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
                print(f"{'':4}  {'':14}  $ {command}", flush=True)
    fails = sum(finding.state == "FAIL" for finding in found)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
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
    if not torch.cuda.is_available():
        return Finding(
            "note",
            "GPU",
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU, as it was "
            f"built for CUDA {torch.version.cuda or '(none)'}: training runs on the CPU",
            tuple(_versions.repair(versions, sys.executable, broken=True)),
        )
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    text = (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB; torch "
        f"built for CUDA {torch.version.cuda}"
    )
    if versions.fbgemm_build == "cpu":
        return Finding(
            "note",
            "GPU",
            f"{text}; FBGEMM's CPU build does not use it",
            (
                f"{sys.executable} -m pip uninstall -y fbgemm-gpu-cpu",
                f"{sys.executable} -m pip install fbgemm-gpu=={versions.fbgemm}",
            ),
        )
    return Finding("ok", "GPU", text)


def _backend(device: torch.device) -> Finding:
    """Starts a process group of this process alone, which stays if it works."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in available.items())
    fix = (f"{sys.executable} -m pip install --force-reinstall torch=={torch.__version__}",)
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
    fused = EmbeddingComputeKernel.FUSED
    cases = [(name, name, fused) for name in _SHARDING]
    if device.type == "cuda":
        cases += [(f"table-wise, {k.value}", "table-wise", k) for k in _CUDA_KERNELS]
    works, fails = [], []
    for label, sharding, kernel in cases:
        try:
            difference = _train(device, _SHARDING[sharding], kernel)
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "no reason given")
            fails.append(f"{label}: {type(error).__name__}: {line}")
            continue
        if difference is None:
            works.append(label)
        else:
            fails.append(f"{label}: {difference}")
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


def _train(
    device: torch.device, sharding: Callable[[], Any], kernel: EmbeddingComputeKernel
) -> str | None:
    """Trains some steps; returns how the result differs from the reference, or None."""
    torch.manual_seed(0)
    table = EmbeddingBagConfig(
        name="t", feature_names=["f"], num_embeddings=_ROWS, embedding_dim=_DIM
    )
    collection = EmbeddingBagCollection(tables=[table])
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": _LR})
    weight_RD = collection.embedding_bags["t"].weight.detach().double().clone()
    sharder = EmbeddingBagCollectionSharder()
    plan = sharding_plan.construct_module_sharding_plan(
        collection, {"t": sharding()}, sharder=sharder, device_type=device.type
    )
    parameter: ParameterSharding = plan["t"]
    if parameter.compute_kernel == EmbeddingComputeKernel.FUSED.value:
        parameter.compute_kernel = kernel.value
    model = DistributedModelParallel(
        collection,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan(plan={"": plan}),
        sharders=[sharder],
    )
    _copy(weight_RD.float(), model, into=True)
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
    expected_RD, counts_R = _reference(weight_RD, ids_SL, target_SBD.double(), _DIM // columns)
    trained_RD = torch.zeros(_ROWS, _DIM)
    _copy(trained_RD, model, into=False)
    if not torch.equal(row_counts(model)["t"], counts_R):
        return "the counts are wrong"
    most = float((trained_RD - expected_RD).abs().max())
    return None if most < 1e-5 else f"weights differ by up to {most:.2g}"


@torch.no_grad()
def _copy(whole_RD: Tensor, model: torch.nn.Module, *, into: bool) -> None:
    """Between a whole table and its shards, all of which are here."""
    (value,) = model.state_dict().values()
    if not isinstance(value, ShardedTensor):
        pairs = [(whole_RD, value)]
    else:
        pairs = []
        for shard in value.local_shards():
            area = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            index = tuple(slice(start, start + size) for start, size in area)
            pairs.append((whole_RD[index], shard.tensor))
    for part_RD, shard_RD in pairs:
        source, goal = (part_RD, shard_RD) if into else (shard_RD, part_RD)
        goal.copy_(source)


def _reference(
    weight_RD: Tensor, ids_SL: Tensor, target_SBD: Tensor, shards: int
) -> tuple[Tensor, Tensor]:
    """The rule in plain torch and float64, which shares no code with the engine.

    Args:
        shards: of the columns, each of which goes by the squares of its own.
    """
    counts_R = torch.zeros(_ROWS, dtype=torch.int64)
    squares = 0.0
    weight_RD = weight_RD.clone()
    for ids_L, target_BD in zip(ids_SL, target_SBD, strict=True):
        output_BD = weight_RD[ids_L].view(_SAMPLES, _IDS, _DIM).sum(dim=1)
        grad_BD = 2 * (output_BD - target_BD) / target_BD.numel()
        grad_RD = torch.zeros_like(weight_RD)
        grad_RD.index_add_(0, ids_L, grad_BD.repeat_interleave(_IDS, dim=0))
        per_count = squares / max(int(counts_R.sum()), 1)
        counts_R += torch.bincount(ids_L, minlength=_ROWS)
        own_RD = grad_RD.view(_ROWS, shards, -1).square().mean(dim=2)
        own_RD = own_RD.repeat_interleave(_DIM // shards, dim=1)
        root_RD = ((per_count * counts_R.unsqueeze(1) + DEFAULT_OWN_WEIGHT * own_RD) / 2).sqrt()
        weight_RD -= _LR / (root_RD + DEFAULT_EPS) * grad_RD
        squares += float(own_RD.mean(dim=1).sum())
    return weight_RD, counts_R


def _tools() -> Iterator[Finding]:
    """What is needed besides training itself."""
    for extra, names in _extras().items():
        missing = [name for name in names if not _installed(name)]
        if missing:
            text = f"of the extra {extra!r} missing: {', '.join(missing)}"
            fix = (f"{sys.executable} -m pip install {' '.join(missing)}",)
            yield Finding("note", "extras", text, fix)
        else:
            yield Finding("ok", "extras", f"{extra}: {', '.join(names)}")
    if shutil.which("torchrun") is None:
        folder = os.path.dirname(sys.executable)
        yield Finding(
            "note",
            "torchrun",
            "not on PATH, where torchx looks for it",
            (f'export PATH="{folder}:$PATH"',),
        )


def _extras() -> dict[str, list[str]]:
    """Extra -> distributions, as the installed package's metadata say."""
    try:
        requirements = importlib.metadata.requires(_NAME) or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        return {}
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] != "dev" and name[0] != _NAME:
            extras.setdefault(extra[1], []).append(name[0])
    return extras


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
