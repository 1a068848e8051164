"""Trains TorchRec's DLRM on MovieLens with FrequencySGD, SGD and row-wise Adagrad, side by side.

    torchrun --standalone --nproc-per-node 2 -m examples.demo

All arms start from the same weights and see the same batches in turn. They differ in one line: the
optimizer of the embedding tables. Runs on CUDA with nccl where there is a GPU, on CPU with gloo
otherwise.
"""

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from tqdm import tqdm

from benchmarks.common.movielens import MovieLens, fetch, read
from benchmarks.common.pictures import picture
from benchmarks.common.ranks import start_ranks
from benchmarks.common.training import OPTIMIZERS, Training, optimizer_bytes, shard_alike
from torchrec_freq import row_counts
from torchrec_freq.output import check_folder, write_text

# The best of a grid by validation after one epoch, as `make study-full` finds for this model.
LR = {"FrequencySGD": 0.03, "SGD": 30.0, "RowWiseAdagrad": 0.03}
EMBEDDING_DIM = 16
EVALUATIONS = 4  # points of a learning curve in an epoch
EVALUATION_BATCH = 4096  # samples, all ranks
DATA = Path(__file__).resolve().parent.parent / ".data" / "ml-100k"


@dataclass
class Arm:
    """A model in training, and how it fares."""

    training: Training
    lr: float
    seconds: list[float] = field(default_factory=list)  # one a step
    curve: list[dict[str, Any]] = field(default_factory=list)  # one point an evaluation

    def step(self, batch: Batch) -> float:
        start = time.perf_counter()
        loss, _ = self.training.step(batch)
        value = float(loss)  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        return value


Arms = dict[str, Arm]
"""By optimizer."""


def build(name: str, lr: float, seed: int, data: MovieLens, device: torch.device) -> Arm:
    torch.manual_seed(seed)  # every arm and every rank draws the same weights
    tables = [
        EmbeddingBagConfig(rows, EMBEDDING_DIM, name=feature, feature_names=[feature])
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

    return Arm(shard_alike(DLRMTrain(dlrm), tables, device), lr)


def train(args: argparse.Namespace, arms: Arms, data: MovieLens) -> None:
    """Trains the arms in turn on each batch and fills their curves."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    device = next(iter(arms.values())).training.model.device
    steps = len(data.train) // args.batch_size  # an epoch; the rest of the ratings is left out
    if steps < EVALUATIONS:
        raise ValueError(f"batch size {args.batch_size} is too large for {len(data.train)} ratings")
    evaluation_steps = {steps * n // EVALUATIONS for n in range(1, EVALUATIONS + 1)}

    def batch(rows: Tensor) -> tuple[Batch, Tensor]:
        """This rank's share, and which of it are ratings of rare items."""
        share = rows.tensor_split(world_size)[rank]
        return data.batch(share).to(device), data.rare[share].to(device)

    held_out = {
        name: [batch(rows) for rows in split.split(EVALUATION_BATCH)]
        for name, split in (("valid", data.valid), ("test", data.test))
    }

    def evaluate(epoch: float) -> None:
        for arm in arms.values():
            figures = {name: arm.training.evaluate(split) for name, split in held_out.items()}
            arm.curve.append({"epoch": epoch, "step": len(arm.seconds)} | figures)

    evaluate(epoch=0)
    generator = torch.Generator().manual_seed(args.seed)
    unit = args.batch_size * len(arms)
    options = {"unit": " samples", "unit_scale": True, "disable": rank != 0}
    with tqdm(desc="train", total=args.epochs * steps * unit, **options) as bar:
        for epoch in range(args.epochs):
            order = data.train[torch.randperm(len(data.train), generator=generator)]
            for step, rows in enumerate(order.split(args.batch_size)[:steps], start=1):
                samples, _ = batch(rows)
                losses = {name: f"{arm.step(samples):.3f}" for name, arm in arms.items()}
                bar.set_postfix(losses, refresh=False)
                bar.update(unit)
                if step in evaluation_steps:
                    evaluate(epoch + step / steps)


def compare(args: argparse.Namespace, data: MovieLens, device: torch.device) -> None:
    """The demo: one arm an optimizer, figures on the test ratings."""
    lrs = LR if args.lr is None else dict.fromkeys(LR, args.lr)
    arms = {name: build(name, lrs[name], args.seed, data, device) for name in args.optimizer}
    train(args, arms, data)
    results: dict[str, Any] = {
        "ratings": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "rare_below": data.rare_below,
        "ranks": dist.get_world_size(),
        "device": device.type,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "seed": args.seed,
        "tables": data.tables,
        "arms": {
            name: {
                "lr": arm.lr,
                "seconds_per_step": statistics.median(arm.seconds),
                "optimizer_bytes_per_row": optimizer_bytes(arm.training.model)
                / sum(data.tables.values()),
                "curve": arm.curve,
            }
            for name, arm in arms.items()
        },
        "lookups": {},
    }
    if "FrequencySGD" in arms:  # what it counted: the ids looked up in each table
        counts = row_counts(arms["FrequencySGD"].training.model)
        results["lookups"] = {table: int(counts_R.sum()) for table, counts_R in counts.items()}
    if dist.get_rank() == 0:
        write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
        with picture(args.out / "learning_curves.png") as figure:
            plot(results, figure)
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
    return "\n".join(lines) + (
        "\n\nFigures on test ratings. Best: where the AUC on validation ratings is highest. "
        f"Rare: fewer than {results['rare_below']} train ratings. "
        "Bytes: state of the embedding optimizer."
    )


def plot(results: dict[str, Any], figure: Any) -> None:
    figure.set_size_inches(13, 4)
    titles = {"auc": "test AUC", "log_loss": "test log loss", "rare_auc": "test AUC, rare items"}
    panels = figure.subplots(1, 3)
    for panel, (metric, title) in zip(panels, titles.items(), strict=True):
        for name, arm in results["arms"].items():
            curve = arm["curve"][1:]  # the untrained model would set the scale
            steps = [point["step"] for point in curve]
            values = [point["test"][metric] for point in curve]
            panel.plot(steps, values, marker=".", label=f"{name}, lr {arm['lr']:g}")
        panel.set(title=title, xlabel=f"steps of {results['batch_size']} samples")
    panels[0].legend()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of MovieLens-100K (default: fetch it)")
    add("--epochs", type=int, default=5, help="passes over the train ratings (default: 5)")
    add("--batch-size", type=int, default=256, help="samples a step, all ranks (default: 256)")
    add("--lr", type=float, help=f"lr of the embedding tables (default: {LR})")
    add("--optimizer", nargs="+", choices=LR, default=list(LR), help="arms to train")
    add("--seed", type=int, default=0, help="of the initial weights and the order (default: 0)")
    add("--limit", type=int, help="use the first so many ratings only")
    add("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, not {args.seed}.")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr must be a finite number above 0, not {args.lr}.")
    try:
        check_folder(args.out)
    except OSError as error:
        parser.error(str(error))
    return args


@record
def main() -> None:
    args = parse_args()
    with start_ranks() as device:
        if args.data is None and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            fetch(DATA)
        dist.barrier()
        compare(args, read(args.data or DATA, args.limit), device)


if __name__ == "__main__":
    main()
