"""What a step costs with FrequencySGD, beside FBGEMM's plain SGD, its row-wise Adagrad and others.

    python -m benchmarks.bench tbe                                        # bare FBGEMM tables
    torchrun --standalone --nproc-per-node 2 -m benchmarks.bench sharded  # TorchRec, two ranks
    python -m benchmarks.bench report                                     # tables and a plot
    python -m benchmarks.bench profile                                    # by operator

`make bench` does all of it. The optimizers take turns, a step each, on the same ids, so what
disturbs the machine disturbs all of them; a ratio is formed within a turn, and the median of the
turns is reported with its quartiles. On CUDA steps are timed by events, otherwise by the clock.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
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
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from examples.training import optimizer_bytes
from torchrec_freq import FrequencyConfig, FrequencySGD
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.planner import make_planner

REPOSITORY = Path(__file__).resolve().parent.parent
BATCHES = 4  # different batches that take turns
LR = 0.01
BASE = "SGD"
ADAGRAD = "RowWiseAdagrad"  # what a user comes from
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    BASE: torch.optim.SGD,
    "FrequencySGD": FrequencySGD,
    ADAGRAD: RowWiseAdagrad,
    "Adagrad": torch.optim.Adagrad,
}
# The kernels of FBGEMM; ours and its counter mode are built on another one.
TBE_OPTIMIZERS = {
    BASE: EmbOptimType.EXACT_SGD,
    "FrequencySGD": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "COUNTER_SGD": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    ADAGRAD: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "Adagrad": EmbOptimType.EXACT_ADAGRAD,
}


@dataclass(frozen=True)
class Shape:
    """Tables of equal size, each read by one feature.

    Attributes:
        batch: samples, of all ranks.
        ids: ids in a bag; drawn evenly from the rows.
    """

    tables: int
    rows: int
    dim: int
    batch: int
    ids: int

    def __str__(self) -> str:
        return f"{self.tables} x {self.rows:,} x {self.dim}, {self.batch}, {self.ids}"


def reference_shapes() -> list[Shape]:
    """The shapes that the figures in the README are of."""
    return [
        Shape(tables=8, rows=200_000, dim=64, batch=2048, ids=10),
        Shape(tables=26, rows=100_000, dim=64, batch=2048, ids=1),
        Shape(tables=26, rows=100_000, dim=16, batch=4096, ids=1),
    ]


def sweeps() -> dict[str, list[Shape]]:
    """Shapes that differ in one number."""
    base = Shape(tables=4, rows=100_000, dim=64, batch=2048, ids=10)
    values = {
        "rows": (100_000, 1_000_000, 10_000_000),
        "dim": (16, 64, 128, 256),
        "batch": (128, 512, 2048, 8192),
        "ids": (1, 4, 10, 40),
        "tables": (1, 4, 16, 64),
    }
    sweeps = {
        field: [replace(base, **{field: value}) for value in values[field]] for field in values
    }
    # Of the largest, one table for each optimizer is what fits in memory.
    sweeps["rows"] = [replace(shape, tables=1) for shape in sweeps["rows"]]
    return sweeps


Step = Callable[[int], None]
"""Trains on one of the ``BATCHES``."""


@dataclass
class Result:
    """How the steps of an optimizer compare with those of SGD, on one shape.

    Attributes:
        ratio: quartiles of step time over that of SGD in the same turn.
        to_adagrad: the same over that of row-wise Adagrad; empty where it did not take part.
        ms: median.
        state_bytes: of the optimizer, a row.
        peak_bytes: most memory that a step takes besides what is there before.
        operators: torch operators of a step that are no mere views, each a kernel launch on a GPU;
            those inside FBGEMM's and DDP's own operators are not seen.
    """

    workload: str
    ranks: int
    device: str
    shape: Shape
    optimizer: str
    ratio: list[float]
    to_adagrad: list[float]
    ms: float
    state_bytes: float
    peak_bytes: int
    operators: int


def measure(
    steps: dict[str, Step], device: torch.device, turns: int, warm_up: int = 4
) -> dict[str, tuple[list[float], list[float], float, int, int]]:
    """Quartiles of the ratios to ``BASE`` and ``ADAGRAD``, median ms, peak bytes and operators."""
    order, rng = list(steps), random.Random(0)
    for turn in range(warm_up):
        for name in order:
            steps[name](turn % BATCHES)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        rng.shuffle(order)  # the same on every rank
        for name in order:
            taken[name].append(_time(steps[name], turn % BATCHES, device))

    def ratios(ms: list[float], other: str) -> list[float]:
        pairs = zip(ms, taken.get(other, []), strict=other in taken)
        return statistics.quantiles([own / base for own, base in pairs]) if other in taken else []

    return {
        name: (
            ratios(ms, BASE),
            ratios(ms, ADAGRAD),
            statistics.median(ms),
            _peak(steps[name], device),
            _operators(steps[name]),
        )
        for name, ms in taken.items()
    }


def _time(step: Step, batch: int, device: torch.device) -> float:
    """Milliseconds."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        step(batch)
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    step(batch)
    return (time.perf_counter() - start) * 1e3


class _Counter(TorchDispatchMode):
    """Counts operators that are not views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _operators(step: Step) -> int:
    counter = _Counter()
    with counter:
        step(0)
    return counter.count


def _peak(step: Step, device: torch.device) -> int:
    """Bytes that a step needs at once, besides those that were allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(0)
        torch.cuda.synchronize(device)
        peak_bytes: int = torch.cuda.max_memory_allocated(device) - before
        return peak_bytes
    with _quiet(), torch.profiler.profile(profile_memory=True) as profile:
        step(0)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the profiler's C++ writes to stderr whenever it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# Bare tables.


def bench_tbe(shapes: list[Shape], device: torch.device, turns: int) -> list[Result]:
    results = []
    for shape in tqdm(shapes, desc="bare tables", unit=" shapes"):
        batches = [_ids(shape, device, seed) for seed in range(BATCHES)]
        gradient = torch.randn(shape.batch, shape.tables * shape.dim, device=device)
        tbes = {name: _tbe(name, shape, device) for name in _tbe_optimizers(shape)}

        def step_of(tbe: Any, batches: Any = batches, gradient: Tensor = gradient) -> Step:
            return lambda batch: tbe(*batches[batch]).backward(gradient)

        figures = measure({name: step_of(tbe) for name, tbe in tbes.items()}, device, turns)
        for name, tbe in tbes.items():
            ratio, to_adagrad, ms, *rest = figures[name]
            state = _tbe_state_bytes(tbe) / (shape.tables * shape.rows)
            key = ("tbe", 1, device.type, shape, name)
            results.append(Result(*key, ratio, to_adagrad, ms, state, *rest))
    return results


def _tbe_optimizers(shape: Shape) -> list[str]:
    names = list(TBE_OPTIMIZERS)
    # Five copies of the largest tables do not fit in memory.
    return names if shape.tables * shape.rows * shape.dim <= 2**28 else [*names[:2], ADAGRAD]


def _tbe(optimizer: str, shape: Shape, device: torch.device) -> Any:
    on_gpu = device.type == "cuda"
    place = (
        (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        if on_gpu
        else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    )
    specs = [(shape.rows, shape.dim, *place)] * shape.tables
    options: dict[str, Any] = {"learning_rate": LR, "device": device}
    if optimizer == "FrequencySGD":
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


def _tbe_state_bytes(tbe: Any) -> int:
    if isinstance(tbe, FrequencyTBE):
        return tbe.counts.nbytes
    if tbe.optimizer == EmbOptimType.EXACT_SGD:
        return 0
    states = tbe.get_optimizer_state()
    # A number that is not one a row is the number of steps.
    return sum(value.nbytes for state in states for value in state.values() if value.numel() > 1)


def _ids(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and offsets, feature by feature."""
    generator = torch.Generator().manual_seed(seed)
    bags = shape.tables * shape.batch
    ids = torch.randint(shape.rows, (bags * shape.ids,), generator=generator)
    offsets = torch.arange(bags + 1) * shape.ids
    return ids.to(device), offsets.to(device)


def profile_tbe(shape: Shape, device: torch.device, steps: int = 20, lines: int = 12) -> str:
    """Where a step takes longer than with row-wise Adagrad, by operator, as Markdown."""
    batches = [_ids(shape, device, seed) for seed in range(BATCHES)]
    gradient = torch.randn(shape.batch, shape.tables * shape.dim, device=device)
    base = _ms_by_operator(ADAGRAD, shape, batches, gradient, steps)
    ours = _ms_by_operator("FrequencySGD", shape, batches, gradient, steps)
    pairs = {name: (base.get(name, 0.0), ours.get(name, 0.0)) for name in base | ours}
    largest = sorted(pairs, key=lambda name: pairs[name][0] - pairs[name][1])[:lines]
    rows = {f"`{name}`": pairs[name] for name in largest}
    total = (sum(base.values()), sum(ours.values()))
    rest = [whole - sum(part[i] for part in rows.values()) for i, whole in enumerate(total)]
    rows |= {"all others": (rest[0], rest[1]), "step": total}
    table = ["| operator, ms a step | RowWiseAdagrad | FrequencySGD | more |", "|---|---|---|---|"]
    table += [f"| {name} | {a:.2f} | {b:.2f} | {b - a:.2f} |" for name, (a, b) in rows.items()]
    return "\n".join([f"{shape}:", "", *table, ""])


def _ms_by_operator(
    optimizer: str,
    shape: Shape,
    batches: list[tuple[Tensor, Tensor]],
    gradient: Tensor,
    steps: int,
) -> dict[str, float]:
    """Time within each operator itself in a step: of the GPU's where there is one."""
    tbe = _tbe(optimizer, shape, gradient.device)
    for _ in range(2):  # the first steps warm up
        with _quiet(), torch.profiler.profile() as profile:
            for step in range(steps):
                tbe(*batches[step % BATCHES]).backward(gradient)
    where = "device" if gradient.is_cuda else "cpu"
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        # What autograd spends on an operator is a part of it.
        name = event.key.removeprefix("autograd::engine::evaluate_function: ")
        times[name] += getattr(event, f"self_{where}_time_total") / (1e3 * steps)
    return times


# Sharded modules.


def bench_sharded(shape: Shape, device: torch.device, turns: int) -> list[Result]:
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
    results = []
    for workload in ("collection", "DLRM"):
        steps: dict[str, Step] = {}
        models: dict[str, DistributedModelParallel] = {}
        for optimizer, kind in OPTIMIZERS.items():
            models[optimizer], steps[optimizer] = _model(
                workload, kind, shape, names, batches, gradient, device
            )
        if rank == 0:
            print(f"{workload} on {ranks} ranks: {turns} turns", flush=True)
        figures = measure(steps, device, turns)
        for optimizer, (ratio, to_adagrad, ms, *rest) in figures.items():
            state = optimizer_bytes(models[optimizer]) / (shape.tables * shape.rows)
            key = (workload, ranks, device.type, shape, optimizer)
            results.append(Result(*key, ratio, to_adagrad, ms, state, *rest))
    return results


def _model(
    workload: str,
    optimizer: type[torch.optim.Optimizer],
    shape: Shape,
    names: list[str],
    batches: list[tuple[Tensor, KeyedJaggedTensor, Tensor]],
    gradient: Tensor,
    device: torch.device,
) -> tuple[DistributedModelParallel, Step]:
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, feature_names=[name], num_embeddings=shape.rows, embedding_dim=shape.dim
            )
            for name in names
        ],
        device=torch.device("meta"),
    )
    apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR})
    module: nn.Module = collection
    if workload == "DLRM":
        module = DLRM(
            collection,
            dense_in_features=13,
            dense_arch_layer_sizes=[512, 256, shape.dim],
            over_arch_layer_sizes=[512, 512, 256, 1],
            dense_device=device,
        )
    planner = make_planner(
        batch_size=shape.batch // dist.get_world_size(),
        constraints={
            name: ParameterConstraints(
                sharding_types=["table_wise"],
                compute_kernels=["fused"],
                pooling_factors=[float(shape.ids)],
            )
            for name in names
        },
    )
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    model = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)

    if workload == "collection":

        def step(batch: int) -> None:
            model(batches[batch][1]).values().backward(gradient)

        return model, step

    dense_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )
    criterion = nn.BCEWithLogitsLoss()

    def train(batch: int) -> None:
        dense, features, labels = batches[batch]
        dense_optimizer.zero_grad()
        criterion(model(dense, features).squeeze(1), labels).backward()
        dense_optimizer.step()

    return model, train


# Report.


def table(results: list[Result]) -> str:
    """Ratios, a line a workload and shape."""
    optimizers = list(TBE_OPTIMIZERS)
    lines = [
        "| workload, ranks | tables x rows x dim, batch, ids a bag | SGD, ms | "
        + " | ".join(optimizers[1:])
        + " | of RowWiseAdagrad | peak | operators |",
        "|---" * (len(optimizers) + 5) + "|",
    ]
    for key in dict.fromkeys((r.workload, r.ranks, r.shape) for r in results):
        of = {r.optimizer: r for r in results if (r.workload, r.ranks, r.shape) == key}
        base, ours, theirs = of[BASE], of["FrequencySGD"], of[ADAGRAD]
        cells = [f"{key[0]}, {key[1]}", str(key[2]), f"{base.ms:.1f}"]
        ratios = [of[name].ratio if name in of else [] for name in optimizers[1:]]
        for quartiles in [*ratios, ours.to_adagrad]:
            low, middle, high = quartiles or (0, 0, 0)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})" if quartiles else "")
        weights = key[2].tables * key[2].rows * key[2].dim * 4 / key[1]
        state = ours.state_bytes * key[2].tables * key[2].rows / key[1]
        peak = (weights + state + ours.peak_bytes) / (weights + state + theirs.peak_bytes)
        cells += [f"{peak:.3f}", f"+{ours.operators - theirs.operators}"]
        lines.append("| " + " | ".join(cells) + " |")
    states = {r.optimizer: f"{r.state_bytes:.4g}" for r in results if r.shape.dim == 64}
    lines += [
        "",
        "Median ratio to SGD in a turn (quartiles), and that of FrequencySGD to RowWiseAdagrad. "
        "Peak: memory of tables, state and step, FrequencySGD / RowWiseAdagrad. Operators: those "
        "that a step of FrequencySGD has more.",
        "State, bytes a row of 64 columns: "
        + ", ".join(f"{name} {size}" for name, size in states.items())
        + ".",
    ]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """How a step grows with each number of the shape: ratio to SGD, and ms."""
    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(sweeps()), figsize=(16, 6), sharey="row", layout="constrained"
    )
    for column, (field, shapes) in enumerate(sweeps().items()):
        for name in dict.fromkeys(r.optimizer for r in results):
            found = {r.shape: r for r in results if r.optimizer == name and r.workload == "tbe"}
            if not (points := [found[shape] for shape in shapes if shape in found]):
                continue
            x = [getattr(point.shape, field) for point in points]
            panels[0][column].plot(x, [p.ratio[1] for p in points], marker=".", label=name)
            panels[1][column].plot(x, [p.ms for p in points], marker=".", label=name)
        for panel in panels[:, column]:
            panel.set(xlabel=field, xscale="log")
            panel.grid(alpha=0.3)
        panels[1][column].set(yscale="log")
    panels[0][0].set(ylabel="step / step of SGD")
    panels[1][0].set(ylabel="step, ms")
    if panels[0][0].lines:
        panels[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
    return [Result(**{**entry, "shape": Shape(**entry["shape"])}) for entry in found]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tbe", "sharded", "report", "profile"])
    parser.add_argument("--turns", type=int, default=40, help="steps of each optimizer and shape")
    parser.add_argument("--reference", action="store_true", help="tbe: the reference shapes alone")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "runs" / "bench", metavar="DIR", help="results"
    )
    return parser.parse_args()


@record
def main() -> None:
    args = parse()
    if args.what == "report":
        results = load(args.out)
        print(table(results))
        plot(results, args.out / "bench.png")
        print(f"Wrote {args.out / 'bench.png'}")
        return
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.what == "profile":
        for shape in reference_shapes():
            print(profile_tbe(shape, device))
        return
    if args.what == "tbe":
        shapes = reference_shapes()
        if not args.reference:
            shapes += [shape for sweep in sweeps().values() for shape in sweep]
        save(bench_tbe(list(dict.fromkeys(shapes)), device, args.turns), args.out / "tbe.json")
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(dist.get_rank())
    results = bench_sharded(reference_shapes()[0], device, args.turns)
    if dist.get_rank() == 0:
        save(results, args.out / f"sharded-{dist.get_world_size()}.json")
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
