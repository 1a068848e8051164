"""Trains TorchRec's DLRM on MovieLens with FrequencySGD, SGD and row-wise Adagrad, side by side.

    torchrun --standalone --nproc-per-node 2 -m examples.demo

All arms start from the same weights and see the same batches in turn. They differ in one line: the
optimizer of the embedding tables. Runs on CUDA with nccl where there is a GPU, on CPU with gloo
otherwise. With --checkpoint-dir the same command goes on where the last run was cut off, also on
another number of ranks.
"""

import argparse
import json
import logging
import math
import os
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.types import ShardedTensor, ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from tqdm import tqdm

from examples.checkpoint import Checkpoints
from examples.movielens import MovieLens, fetch, read
from torchrec_freq import FrequencySGD, row_counts
from torchrec_freq.output import check_folder, write_text, writing

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "RowWiseAdagrad": RowWiseAdagrad,
}
# The best of a grid by validation after one epoch, as `make study-full` finds for this model.
LR = {"FrequencySGD": 0.03, "SGD": 30.0, "RowWiseAdagrad": 0.03}
DENSE_LR = 1e-3  # Adam on the dense layers, the same in every arm
EMBEDDING_DIM = 16
EVALUATIONS = 4  # points of a learning curve in an epoch
EVALUATION_BATCH = 4096  # samples, all ranks
CHECKPOINT_EVERY, KEEP = 100, 2  # steps; checkpoints

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / ".data" / "ml-100k"


@dataclass
class Arm:
    """A sharded model, its optimizers, and how it fares."""

    optimizer_name: str
    lr: float
    model: DistributedModelParallel
    dense_optimizer: KeyedOptimizerWrapper
    optimizer: CombinedOptimizer  # of the tables and the dense layers
    seconds: list[float] = field(default_factory=list)  # one a step
    curve: list[dict[str, Any]] = field(default_factory=list)  # one point an evaluation

    def step(self, batch: Batch) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.backward()  # updates the embedding tables, too
        self.optimizer.step()
        value = float(loss.detach())  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        return value

    @torch.no_grad()
    def evaluate(self, batches: list[tuple[Batch, Tensor]]) -> dict[str, float]:
        """Figures over the batches of all ranks; each comes with a mask of its rare items."""
        device = self.model.device
        auc, rare_auc = BinaryAUROC().to(device), BinaryAUROC(ignore_index=-1).to(device)
        log_loss = MeanMetric().to(device)
        self.model.eval()
        for batch, rare in batches:
            _, (loss, logits, labels) = self.model(batch)
            auc.update(logits.sigmoid(), labels.int())
            rare_auc.update(logits.sigmoid(), labels.int().where(rare, -1))
            log_loss.update(loss, len(labels))
        self.model.train()
        metrics = {"auc": auc, "log_loss": log_loss, "rare_auc": rare_auc}
        return {name: float(metric.compute()) for name, metric in metrics.items()}


def optimizer_bytes(model: DistributedModelParallel) -> int:
    """Memory of the embedding optimizer's state, over all ranks."""
    states = model.fused_optimizer.state_dict()["state"].values()
    tensors = [
        shard.tensor
        for state in states
        for value in state.values()
        if hasattr(value, "local_shards")  # not the few numbers a table
        for shard in value.local_shards()
    ]
    total = torch.tensor(sum(tensor.nbytes for tensor in tensors), device=model.device)
    dist.all_reduce(total)
    return int(total)


@torch.no_grad()
def load_weights(model: DistributedModelParallel, weights: dict[str, Tensor]) -> None:
    """Copies unsharded table weights into this rank's shards, which TorchRec initialises anew."""
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                area = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
                index = tuple(slice(start, start + size) for start, size in area)
                shard.tensor.copy_(weights[name][index])


def build(name: str, lr: float, seed: int, data: MovieLens, device: torch.device) -> Arm:
    torch.manual_seed(seed)  # every arm and every rank draws the same weights
    tables = [
        EmbeddingBagConfig(
            name=feature, feature_names=[feature], num_embeddings=rows, embedding_dim=EMBEDDING_DIM
        )
        for feature, rows in data.tables.items()
    ]
    dlrm = DLRM(
        EmbeddingBagCollection(tables),
        dense_in_features=data.dense.shape[1],
        dense_arch_layer_sizes=[32, EMBEDDING_DIM],
        over_arch_layer_sizes=[64, 32, 1],
    )

    # The line to change in a model of yours: FrequencySGD in place of another optimizer.
    apply_optimizer_in_backward(OPTIMIZERS[name], dlrm.sparse_arch.parameters(), {"lr": lr})

    return shard(name, lr, DLRMTrain(dlrm), tables, device)


def shard(
    name: str, lr: float, module: nn.Module, tables: list[EmbeddingBagConfig], device: torch.device
) -> Arm:
    """Shards a model with a loss, whose tables have their optimizer, and adds the dense layers'."""
    # For a fair comparison no table is data-parallel: TorchRec drops SGD and Adagrad there.
    sharding_types = [t.value for t in ShardingType if t is not ShardingType.DATA_PARALLEL]
    planner = EmbeddingShardingPlanner(
        constraints={t.name: ParameterConstraints(sharding_types=sharding_types) for t in tables}
    )
    sharders = [EmbeddingBagCollectionSharder()]
    weights = module.state_dict()  # with `load_weights` the start depends on the seed alone
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    model = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)
    load_weights(model, weights)

    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=DENSE_LR),
    )
    return Arm(name, lr, model, dense, CombinedOptimizer([model.fused_optimizer, dense]))


def save(checkpoints: Checkpoints, step: int, arms: list[Arm]) -> None:
    progress = {a.optimizer_name: {"curve": a.curve, "seconds": a.seconds} for a in arms}
    checkpoints.save(step, state_of(arms), progress)


def resume(checkpoints: Checkpoints, arms: list[Arm]) -> int:
    """Loads the last checkpoint, if there is one, and returns the number of steps trained."""
    found = checkpoints.latest()
    if found is None:
        return 0
    for arm in arms:
        # Adam makes its state in its first step: here one without gradients, which moves nothing.
        arm.dense_optimizer.init_state()
        progress = found.progress[arm.optimizer_name]
        arm.curve, arm.seconds = progress["curve"], progress["seconds"]
    checkpoints.load(found, state_of(arms))
    if dist.get_rank() == 0:
        print(f"Resumed from {found.path}, after {found.step} steps.", flush=True)
    return found.step


def state_of(arms: list[Arm]) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves and loads; the counters are in the optimizer's."""
    models = {f"{arm.optimizer_name} model": arm.model for arm in arms}
    optimizers = {f"{arm.optimizer_name} optimizer": arm.optimizer for arm in arms}
    return {**models, **optimizers}


def train(
    arms: list[Arm],
    data: MovieLens,
    held_out: dict[str, Tensor],
    *,
    batch_size: int,
    epochs: int,
    evaluations: int,
    seed: int,
    title: str,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> None:
    """Trains the arms in turn on each batch and fills their curves with figures on `held_out`.

    With `checkpoints` it goes on from the last one, and saves every `checkpoint_every` steps and at
    the end.
    """
    world_size, rank, device = dist.get_world_size(), dist.get_rank(), arms[0].model.device
    steps = len(data.train) // batch_size  # an epoch; the rest of the ratings is left out
    if steps < evaluations:
        raise ValueError(f"batch size {batch_size} is too large for {len(data.train)} ratings")
    evaluation_steps = {steps * n // evaluations for n in range(1, evaluations + 1)}
    evaluation_batches = {
        name: [
            (data.batch(share).to(device), data.rare[share].to(device))
            for part in rows.split(EVALUATION_BATCH)
            for share in [part.tensor_split(world_size)[rank]]
        ]
        for name, rows in held_out.items()
    }

    def evaluate(epoch: float) -> None:
        for arm in arms:
            figures = {name: arm.evaluate(batches) for name, batches in evaluation_batches.items()}
            arm.curve.append({"epoch": epoch, "step": len(arm.seconds)} | figures)

    trained = resume(checkpoints, arms) if checkpoints else 0
    if trained > epochs * steps:
        raise ValueError(
            f"the checkpoint is {trained} steps old, more than --epochs {epochs} has "
            f"({epochs * steps}). Ask for more epochs, or start anew in another --checkpoint-dir."
        )
    if trained == 0:
        evaluate(epoch=0)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(
        desc=title,
        total=epochs * steps * batch_size * len(arms),
        initial=trained * batch_size * len(arms),
        unit=" samples",
        unit_scale=True,
        disable=rank != 0,
    ) as bar:
        for epoch in range(epochs):
            # Drawn also for an epoch that was trained before: the next one's depends on it.
            order = data.train[torch.randperm(len(data.train), generator=generator)]
            for step, rows in enumerate(order.split(batch_size)[:steps], start=1):
                total = epoch * steps + step
                if total <= trained:
                    continue
                batch = data.batch(rows.tensor_split(world_size)[rank]).to(device)
                losses = {arm.optimizer_name: f"{arm.step(batch):.3f}" for arm in arms}
                bar.set_postfix(losses, refresh=False)
                bar.update(batch_size * len(arms))
                if step in evaluation_steps:
                    evaluate(epoch + step / steps)
                if checkpoints and (total % checkpoint_every == 0 or total == epochs * steps):
                    save(checkpoints, total, arms)


def compare(args: argparse.Namespace, data: MovieLens, device: torch.device) -> None:
    """The demo: one arm an optimizer, figures on the test ratings."""
    lrs = LR if args.lr is None else dict.fromkeys(OPTIMIZERS, args.lr)
    arms = [build(name, lrs[name], args.seed, data, device) for name in args.optimizer]
    ratings = {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)}
    checkpoints = None
    if args.checkpoint_dir is not None:
        settings = {
            "optimizers and lr": {arm.optimizer_name: arm.lr for arm in arms},
            "dense lr": DENSE_LR,
            "seed": args.seed,
            "batch size": args.batch_size,
            "ratings": ratings,
            "tables": data.tables,
        }
        checkpoints = Checkpoints(args.checkpoint_dir, settings=settings, keep=args.keep)
    train(
        arms,
        data,
        {"valid": data.valid, "test": data.test},
        batch_size=args.batch_size,
        epochs=args.epochs,
        evaluations=EVALUATIONS,
        seed=args.seed,
        title="train",
        checkpoints=checkpoints,
        checkpoint_every=args.checkpoint_every,
    )
    results: dict[str, Any] = {
        "ratings": ratings,
        "rare_below": data.rare_below,
        "ranks": dist.get_world_size(),
        "device": device.type,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "seed": args.seed,
        "tables": data.tables,
        "arms": {
            arm.optimizer_name: {
                "lr": arm.lr,
                "seconds_per_step": statistics.median(arm.seconds),
                "optimizer_bytes_per_row": optimizer_bytes(arm.model) / sum(data.tables.values()),
                "curve": arm.curve,
            }
            for arm in arms
        },
        # What FrequencySGD counted: the ids looked up in each table.
        "lookups": {
            table: int(counts.sum())
            for arm in arms
            if arm.optimizer_name == "FrequencySGD"
            for table, counts in row_counts(arm.model).items()
        },
    }
    if dist.get_rank() == 0:
        write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
        with writing(args.out / "learning_curves.png") as file:
            plot(results, file)
        print(table(results))
        print(f"\nWrote learning_curves.png and results.json to {args.out}")


def table(results: dict[str, Any]) -> str:
    """The test figures as a Markdown table."""
    lines = [
        "| optimizer | lr | epochs | AUC | log loss | AUC, rare items | ms a step | bytes a row |",
        "|---" * 8 + "|",
    ]
    for name, arm in results["arms"].items():
        trained = arm["curve"][1:]
        best = max(trained, key=lambda point: float(point["valid"]["auc"]))
        for point in trained:
            if point is best or point is trained[-1] or point["epoch"] == 1:
                test = point["test"]
                lines.append(
                    f"| {name} | {arm['lr']:g} | {point['epoch']:.3g}{' (best)' * (point is best)} "
                    f"| {test['auc']:.4f} | {test['log_loss']:.4f} | {test['rare_auc']:.4f} "
                    f"| {arm['seconds_per_step'] * 1e3:.1f} | {arm['optimizer_bytes_per_row']:g} |"
                )
    lines += [
        "",
        "Figures on test ratings. Best: where the AUC on validation ratings is highest. "
        f"Rare: fewer than {results['rare_below']} train ratings. "
        "Bytes: state of the embedding optimizer.",
    ]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = {"auc": "test AUC", "log_loss": "test log loss", "rare_auc": "test AUC, rare items"}
    for panel, (metric, title) in zip(panels, titles.items(), strict=True):
        for name, arm in results["arms"].items():
            curve = arm["curve"][1:]  # the untrained model would set the scale
            steps = [point["step"] for point in curve]
            values = [point["test"][metric] for point in curve]
            panel.plot(steps, values, marker=".", label=f"{name}, lr {arm['lr']:g}")
        panel.set(title=title, xlabel=f"steps of {results['batch_size']} samples")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="MovieLens-100K or -1M folder (default: fetch 100K)")
    add("--epochs", type=int, default=5, help="passes over the train ratings (default: 5)")
    add("--batch-size", type=int, default=256, help="samples a step, all ranks (default: 256)")
    add("--lr", type=float, help=f"lr of the embedding tables (default: {LR})")
    add(
        "--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="arms to train"
    )
    add("--seed", type=int, default=0, help="of the initial weights and the order (default: 0)")
    add("--limit", type=int, help="use the first so many ratings only")
    add("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    add("--checkpoint-dir", type=Path, help="save here, and resume what is here")
    add(
        "--checkpoint-every",
        type=int,
        default=CHECKPOINT_EVERY,
        help=f"steps from one checkpoint to the next (default: {CHECKPOINT_EVERY})",
    )
    add("--keep", type=int, default=KEEP, help=f"checkpoints to keep (default: {KEEP})")
    args = parser.parse_args()
    if args.checkpoint_dir is None and (args.checkpoint_every, args.keep) != (
        CHECKPOINT_EVERY,
        KEEP,
    ):
        parser.error("--checkpoint-every and --keep need --checkpoint-dir.")
    for name in ("checkpoint_every", "keep", "epochs", "batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, not {args.seed}.")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr must be a finite number above 0, not {args.lr}.")
    try:
        check_folder(args.out)
        if args.checkpoint_dir is not None:
            check_folder(args.checkpoint_dir)
    except OSError as error:
        parser.error(str(error))
    return args


@record
def main() -> None:
    args = parse_args()
    # What TorchRec and TorchMetrics 1.0 say about their own use of torch is no news to a reader.
    warnings.filterwarnings("ignore", module="torchrec|torchmetrics")
    warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.data is None and local_rank == 0:
        fetch(DATA)
    dist.barrier()
    data = read(args.data or DATA, args.limit)
    compare(args, data, device)
    # Not after an error: NCCL may wait there for ranks that wait for this one.
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
