"""What a step costs with FrequencySGD, beside FBGEMM's plain SGD, its row-wise Adagrad and others.

    python -m benchmarks.bench tbe                                        # bare FBGEMM tables
    torchrun --standalone --nproc-per-node 2 -m benchmarks.bench sharded  # TorchRec, two ranks
    python -m benchmarks.bench report                                     # their tables
    python -m benchmarks.bench profile                                    # by operator, or kernel

`make bench` does all of it. The optimizers take turns, a step each, on the same ids
(`timing.py`); a ratio is formed within a turn, and the median of the turns is reported with its
quartiles.
`benchmarks.gpu` has more cases for GPUs, and makes a report.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from benchmarks.common.ranks import start_ranks
from benchmarks.common.training import OPTIMIZERS, optimizer_bytes
from benchmarks.timing import BATCHES, Measured, Step, measure, spent
from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.tbe import FrequencyTBE

REPOSITORY = Path(__file__).resolve().parent.parent
LR = 0.01
BASE, OURS = "SGD", "FrequencySGD"
ADAGRAD = "RowWiseAdagrad"  # what a user comes from
# The kernels of FBGEMM; ours and its counter mode are built on another one.
TBE_OPTIMIZERS = {
    BASE: EmbOptimType.EXACT_SGD,
    OURS: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "COUNTER_SGD": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    ADAGRAD: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "Adagrad": EmbOptimType.EXACT_ADAGRAD,
}


@dataclass(frozen=True)
class Shape:
    """Tables of equal size, each read by one feature.

    Attributes:
        batch: samples, of all ranks.
        ids: ids in a bag.
        zipf: row r is drawn in proportion to 1 / r; else all rows evenly.
        half: tables of float16; else of float32.
        cached: tables in host memory behind a cache on the GPU; without a GPU it changes nothing.
    """

    tables: int
    rows: int
    dim: int
    batch: int
    ids: int
    zipf: bool = False
    half: bool = False
    cached: bool = False

    def __str__(self) -> str:
        flags = {"Zipf": self.zipf, "fp16": self.half, "UVM caching": self.cached}
        return ", ".join(
            [
                f"{self.tables} x {self.rows:,} x {self.dim}, {self.batch}, {self.ids}",
                *(name for name, given in flags.items() if given),
            ]
        )


def variations(base: Shape, values: Mapping[str, Sequence[Any]], fields: int) -> list[Shape]:
    """The base, what differs from it in one field, then in two, up to so many fields."""
    found = [base]
    for count in range(1, fields + 1):
        for names in itertools.combinations(values, count):
            for chosen in itertools.product(*(values[name] for name in names)):
                found.append(replace(base, **dict(zip(names, chosen, strict=True))))
    return found


REFERENCE = (  # the shapes that the figures in the README are of
    Shape(tables=8, rows=200_000, dim=64, batch=2048, ids=10),
    Shape(tables=26, rows=100_000, dim=64, batch=2048, ids=1),
    Shape(tables=26, rows=100_000, dim=16, batch=4096, ids=1),
)
SWEEPS = variations(
    Shape(tables=4, rows=100_000, dim=64, batch=2048, ids=10),
    {
        "rows": (10_000, 1_000_000),
        "dim": (16, 128, 256),
        "batch": (128, 512, 8192),
        "ids": (1, 4, 40),
        "tables": (1, 16, 32),
    },
    fields=1,
)


@dataclass
class Result:
    """How the steps of an optimizer compare with those of others, on one shape.

    Attributes:
        ratio: quartiles of step time over that of SGD in the same turn; empty where it is missing.
        to_adagrad: the same over that of row-wise Adagrad.
        ms: median.
        turns: steps that were timed.
        state_bytes: of the optimizer, a row.

    The others are those of :class:`~benchmarks.timing.Measured`.
    """

    workload: str
    ranks: int
    device: str
    shape: Shape
    optimizer: str
    state_bytes: float
    ratio: list[float]
    to_adagrad: list[float]
    ms: float
    turns: int
    peak_bytes: int
    operators: int
    kernels: float
    kernel_ms: float


def results_of(
    key: tuple[str, int, str, Shape], measured: dict[str, Measured], state: dict[str, float]
) -> list[Result]:
    """Those of a case: workload, ranks, device and shape."""

    def ratio(ms: list[float], other: str) -> list[float]:
        base = measured[other].ms if other in measured else []
        return statistics.quantiles([a / b for a, b in zip(ms, base, strict=True)]) if base else []

    results = []
    for name, found in measured.items():
        ms, *rest = astuple(found)
        quartiles = ratio(ms, BASE), ratio(ms, ADAGRAD)
        results.append(
            Result(*key, name, state[name], *quartiles, statistics.median(ms), len(ms), *rest)
        )
    return results


def result_of(entry: dict[str, Any]) -> Result:
    """That of ``asdict``."""
    return Result(**{**entry, "shape": Shape(**entry["shape"])})


# Bare tables.


def bench_tbe(
    shape: Shape,
    device: torch.device,
    turns: int,
    deadline: float = math.inf,
    failed: dict[str, str] | None = None,
) -> list[Result]:
    """FBGEMM's tables by themselves.

    Args:
        failed: takes the optimizers that do not work, and why; None: they raise.
    """
    step_of = _tbe_steps(shape, device)
    steps: dict[str, Step] = {}
    states: dict[str, float] = {}
    for name in TBE_OPTIMIZERS:
        try:
            tbe = _tbe(name, shape, device)
            step_of(tbe)(0)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = reason(error)
        else:
            steps[name] = step_of(tbe)
            states[name] = _state_bytes(tbe) / (shape.tables * shape.rows)
    measured = measure(steps, device, turns, deadline)
    return results_of(("tbe", 1, device.type, shape), measured, states)


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def _tbe_steps(shape: Shape, device: torch.device) -> Callable[[Any], Step]:
    """Makes the steps of tables, all on the same batches."""
    batches = [_ids(shape, device, seed) for seed in range(BATCHES)]
    gradient = torch.randn(shape.batch, shape.tables * shape.dim, device=device)
    return lambda tbe: lambda batch: tbe(*batches[batch]).backward(gradient)


def _tbe(optimizer: str, shape: Shape, device: torch.device) -> Any:
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if device.type == "cuda":
        on_gpu = EmbeddingLocation.MANAGED_CACHING if shape.cached else EmbeddingLocation.DEVICE
        place = (on_gpu, ComputeDevice.CUDA)
    specs = [(shape.rows, shape.dim, *place)] * shape.tables
    options: dict[str, Any] = {"learning_rate": LR, "device": device}
    if shape.half:
        options["weights_precision"] = SparseType.FP16
    if optimizer == OURS:
        return FrequencyTBE(specs, frequency=FrequencyConfig(), **options)
    if optimizer == "COUNTER_SGD":
        options |= {
            "weight_decay_mode": WeightDecayMode.COUNTER,
            "counter_based_regularization": CounterBasedRegularizationDefinition(
                learning_rate_mode=LearningRateMode.COUNTER_SGD
            ),
        }
    return SplitTableBatchedEmbeddingBagsCodegen(
        specs, optimizer=TBE_OPTIMIZERS[optimizer], **options
    )


def _state_bytes(tbe: Any) -> int:
    if isinstance(tbe, FrequencyTBE):
        return tbe.counts.nbytes
    if tbe.optimizer == EmbOptimType.EXACT_SGD:
        return 0
    states = tbe.get_optimizer_state()
    # A number that is not one a row is the number of steps.
    return sum(value.nbytes for state in states for value in state.values() if value.numel() > 1)


def _ids(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and offsets, feature by feature."""
    where: Any = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    bags = shape.tables * shape.batch
    if shape.zipf:
        drawn = torch.rand(bags * shape.ids, dtype=torch.float64, **where)
        ids = (shape.rows**drawn).long() - 1
    else:
        ids = torch.randint(shape.rows, (bags * shape.ids,), **where)
    return ids, torch.arange(bags + 1, device=device) * shape.ids


Profile = dict[str, dict[str, tuple[float, float]]]
"""What :func:`spent` finds, by optimizer."""


def profile_tbe(shape: Shape, device: torch.device, steps: int = 20) -> Profile:
    """Where a step spends its time with row-wise Adagrad, and with ours."""
    step_of = _tbe_steps(shape, device)
    return {
        name: spent(step_of(_tbe(name, shape, device)), device, steps, warm_up=1)
        for name in (ADAGRAD, OURS)
    }


def profile_table(profile: Profile, lines: int = 12) -> str:
    """What a step of ours takes longer for, as Markdown; on a GPU an operator is a kernel."""
    base, ours = (defaultdict(lambda: (0.0, 0.0), profile[name]) for name in (ADAGRAD, OURS))
    largest = sorted({*base, *ours}, key=lambda name: base[name][1] - ours[name][1])
    parts = [(f"`{name[:100]}`", [name]) for name in largest[:lines]]
    parts += [("all others", largest[lines:]), ("step", largest)]
    table = [
        f"| operator | {ADAGRAD}, ms a step | {OURS} | more | {ADAGRAD}, times | {OURS} | more |",
        "|---" * 7 + "|",
    ]
    for title, names in parts:
        cells = []
        for number, digits in ((1, 3), (0, 1)):
            a, b = (sum(of[name][number] for name in names) for of in (base, ours))
            cells += [f"{value:.{digits}f}" for value in (a, b, b - a)]
        table.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(table)


# Sharded modules.


def bench_sharded(
    shape: Shape, device: torch.device, turns: int, deadline: float = math.inf
) -> list[Result]:
    """A collection alone, and the DLRM around it; this rank's part of the batch."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    names = [f"t{i}" for i in range(shape.tables)]
    local = replace(shape, batch=shape.batch // ranks)
    batches = []
    for number in range(BATCHES):
        ids, offsets = _ids(local, torch.device("cpu"), BATCHES * rank + number)
        features = KeyedJaggedTensor.from_offsets_sync(names, ids, offsets=offsets)
        dense = torch.randn(local.batch, 13)
        labels = torch.randint(2, (local.batch,)).float()
        batches.append((dense.to(device), features.to(device), labels.to(device)))
    gradient = torch.randn(local.batch, shape.tables * shape.dim, device=device)
    criterion = nn.BCEWithLogitsLoss()

    def collection_step(model: DistributedModelParallel) -> Step:
        return lambda batch: model(batches[batch][1]).values().backward(gradient)

    def dlrm_step(model: DistributedModelParallel) -> Step:
        dense_optimizer = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(model.named_parameters())),
            lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        )

        def step(batch: int) -> None:
            dense, features, labels = batches[batch]
            dense_optimizer.zero_grad()
            criterion(model(dense, features).squeeze(1), labels).backward()
            dense_optimizer.step()

        return step

    results = []
    for workload, step_of in {"collection": collection_step, "DLRM": dlrm_step}.items():
        models = {name: _model(workload, name, names, shape, device) for name in OPTIMIZERS}
        if rank == 0:
            print(f"{workload} on {ranks} ranks: {turns} turns", flush=True)
        steps = {name: step_of(model) for name, model in models.items()}
        rows = shape.tables * shape.rows
        states = {name: optimizer_bytes(model) / rows for name, model in models.items()}
        measured = measure(steps, device, turns, deadline)
        results += results_of((workload, ranks, device.type, shape), measured, states)
    return results


def _model(
    workload: str, optimizer: str, names: list[str], shape: Shape, device: torch.device
) -> DistributedModelParallel:
    """Whole tables, one rank after the other."""
    tables = [
        EmbeddingBagConfig(
            name=name, feature_names=[name], num_embeddings=shape.rows, embedding_dim=shape.dim
        )
        for name in names
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], collection.parameters(), {"lr": LR})
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        collection,
        {name: table_wise(rank=i % dist.get_world_size()) for i, name in enumerate(names)},
        sharder=sharder,
        device_type=device.type,
    )
    module, path = collection, ""
    if workload == "DLRM":
        path = "sparse_arch.embedding_bag_collection"
        module = DLRM(
            collection,
            dense_in_features=13,
            dense_arch_layer_sizes=[512, 256, shape.dim],
            over_arch_layer_sizes=[512, 512, 256, 1],
            dense_device=device,
        )
    return DistributedModelParallel(
        module, device=device, plan=ShardingPlan({path: plan}), sharders=[sharder]
    )


# Report.


def table(results: list[Result]) -> str:
    """Times and ratios, a line a workload and shape."""
    optimizers = list(TBE_OPTIMIZERS)
    titles = [
        "workload, ranks",
        "tables x rows x dim, batch, ids a bag",
        f"{BASE}, ms",
        f"{ADAGRAD}, ms",
        f"{OURS}, ms",
        *optimizers[1:],
        f"of {ADAGRAD}",
        "peak",
        "operators",
        "kernels",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for key in dict.fromkeys((r.workload, r.ranks, r.shape) for r in results):
        of = {r.optimizer: r for r in results if (r.workload, r.ranks, r.shape) == key}
        cells = [f"{key[0]}, {key[1]}", str(key[2])]
        cells += [f"{of[name].ms:.3g}" if name in of else "" for name in (BASE, ADAGRAD, OURS)]
        cells += [_quartiles(of[name].ratio) if name in of else "" for name in optimizers[1:]]
        if OURS in of and ADAGRAD in of:
            ours, theirs = of[OURS], of[ADAGRAD]
            weights = key[2].tables * key[2].rows * key[2].dim * (2 if key[2].half else 4) / key[1]
            state = ours.state_bytes * key[2].tables * key[2].rows / key[1]
            peak = (weights + state + ours.peak_bytes) / (weights + state + theirs.peak_bytes)
            mib = " to ".join(f"{r.peak_bytes / 2**20:.0f}" for r in (theirs, ours))
            kernels = " to ".join(f"{r.kernels:.0f} ({r.kernel_ms:.3g} ms)" for r in (theirs, ours))
            cells += [
                _quartiles(ours.to_adagrad),
                f"{peak:.3f} ({mib} MiB)",
                f"+{ours.operators - theirs.operators}",
                kernels if ours.kernels else {"cuda": "not seen"}.get(ours.device, ""),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    dim = results[0].shape.dim if results else 0
    states = {r.optimizer: f"{r.state_bytes:.4g}" for r in results if r.shape.dim == dim}
    lines += [
        "",
        f"Median ratio to {BASE} in a turn (quartiles), and that of {OURS} to {ADAGRAD}. Peak: "
        f"memory of tables, state and step, {OURS} / {ADAGRAD} (that of the step alone, {ADAGRAD} "
        f"to {OURS}). Operators: those that a step of {OURS} has more. Kernels of a step and the "
        f"time within them, {ADAGRAD} to {OURS}.",
        f"State, bytes a row of {dim} columns: "
        + ", ".join(f"{name} {size}" for name, size in states.items())
        + ".",
    ]
    return "\n".join(lines)


def _quartiles(ratio: list[float]) -> str:
    return f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})" if ratio else ""


def save(results: list[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(f"Wrote {path}")


def load(folder: Path) -> list[Result]:
    found = [
        entry for path in sorted(folder.glob("*.json")) for entry in json.loads(path.read_text())
    ]
    if not found:
        raise SystemExit(f"{folder} has no results; run `make bench`.")
    return [result_of(entry) for entry in found]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tbe", "sharded", "report", "profile"])
    parser.add_argument("--turns", type=int, default=40, help="steps of each optimizer and shape")
    parser.add_argument("--seconds", type=float, default=math.inf, help="sharded: stop after them")
    parser.add_argument("--reference", action="store_true", help="tbe: the reference shapes alone")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=5,
        metavar=("TABLES", "ROWS", "DIM", "BATCH", "IDS"),
        help="sharded: instead of the first reference shape",
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "runs" / "bench", metavar="DIR", help="results"
    )
    return parser.parse_args()


@record
def main() -> None:
    args = parse()
    if args.what == "report":
        print(table(load(args.out)))
        return
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.what == "profile":
        for shape in REFERENCE:
            print(f"{shape}:\n\n{profile_table(profile_tbe(shape, device))}\n")
        return
    if args.what == "tbe":
        shapes = REFERENCE if args.reference else [*REFERENCE, *SWEEPS]
        bar = tqdm(dict.fromkeys(shapes), desc="bare tables", unit=" shapes")
        results = [result for shape in bar for result in bench_tbe(shape, device, args.turns)]
        save(results, args.out / "tbe.json")
        return
    with start_ranks() as device:
        torch.manual_seed(dist.get_rank())
        shape = Shape(*args.shape) if args.shape else REFERENCE[0]
        results = bench_sharded(shape, device, args.turns, time.monotonic() + args.seconds)
        if dist.get_rank() == 0:
            save(results, args.out / f"sharded-{dist.get_world_size()}.json")


if __name__ == "__main__":
    main()
