"""What another vocabulary costs: a day's retraining with half the rows, and AUC by rows kept.

The samples come in the order of time. A DLRM trains on the first 60 %. Then `resize` keeps half of
the rows of each large table, those with the largest counts, and adds a row for each other id of the
rest. The model goes on with the next 30 %, and the last 10 % judge.
"""

import argparse
import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.common.samples import Samples, load
from benchmarks.study.data import prepare
from benchmarks.study.train import auc
from torchrec_freq import FrequencySGD, count_ids, save_counts
from torchrec_freq.__main__ import main as command_line
from torchrec_freq.vocabulary import keep_budget, keep_rows

COLUMNS, BATCH, LARGE = 16, 512, 1000
STEPS = (0, 10, 50)
SHARES = [2.0**-n for n in range(7)]
OPTIMIZERS = {"FrequencySGD": FrequencySGD, "row-wise Adagrad": RowWiseAdagrad}
# The vocabulary, and what the rows that are kept keep.
ARMS = (("all", "rates"), ("half", "rates"), ("half", "weights"), ("half", "nothing"))


class Training:
    """A DLRM on one rank; Adam trains what is not a table. An id without a row has no vector."""

    def __init__(
        self, samples: Samples, rows: Mapping[str, int], optimizer: str, lr: float
    ) -> None:
        torch.manual_seed(0)
        self.samples, self.rows = samples, rows
        bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=t, num_embeddings=n, embedding_dim=COLUMNS, feature_names=[t]
                )
                for t, n in rows.items()
            ]
        )
        parameters = list(bags.parameters())
        apply_optimizer_in_backward(OPTIMIZERS[optimizer], parameters, {"lr": lr})
        on_rank_0 = dict.fromkeys(rows, table_wise(rank=0, compute_kernel="fused"))
        sharder = EmbeddingBagCollectionSharder()
        plan = construct_module_sharding_plan(bags, on_rank_0, sharder, device_type="cpu")
        self.model = DistributedModelParallel(
            DLRM(bags, samples.dense.shape[1], [32, COLUMNS], [64, 32, 1]),
            device=torch.device("cpu"),
            plan=ShardingPlan({"sparse_arch.embedding_bag_collection": plan}),
            sharders=[sharder],
        )
        others = [p for name, p in self.model.named_parameters() if "sparse_arch" not in name]
        self.adam = torch.optim.Adam(others, 1e-3)

    def logits(self, part: slice) -> Tensor:
        ids = torch.from_numpy(self.samples.ids[part].T.astype(np.int64))
        has_row = ids < torch.tensor(list(self.rows.values())).unsqueeze(1)
        features = KeyedJaggedTensor(
            keys=list(self.rows), values=ids[has_row], lengths=has_row.flatten().int()
        )
        output: Tensor = self.model(torch.from_numpy(self.samples.dense[part]), features)
        return output.squeeze(1)

    def train(self, first: int, stop: int) -> None:
        for start in range(first, stop, BATCH):
            part = slice(start, min(start + BATCH, stop))
            labels = torch.from_numpy(self.samples.labels[part]).float()
            loss = binary_cross_entropy_with_logits(self.logits(part), labels)
            self.adam.zero_grad()
            loss.backward()  # updates the tables, too
            self.adam.step()

    @torch.no_grad()
    def judge(self, first: int) -> tuple[float, float]:
        """Loss and AUC of the samples from ``first`` on."""
        parts = [slice(start, start + 8192) for start in range(first, len(self.samples), 8192)]
        logits, labels = torch.cat([self.logits(p) for p in parts]), self.samples.labels[first:]
        loss = binary_cross_entropy_with_logits(logits, torch.from_numpy(labels).float())
        return float(loss), auc(logits.numpy(), labels) or 0.0

    def state(self, keeps: str) -> dict[str, Any]:
        model = self.model.state_dict()
        if keeps == "nothing":
            model = {key: value for key, value in model.items() if "embedding_bags" not in key}
        return {"model": model} | (
            {"tables": self.model.fused_optimizer.state_dict()} if keeps == "rates" else {}
        )


def halve(samples: Samples, counts: Mapping[str, Tensor]) -> tuple[Samples, list[str]]:
    """The samples by the new rows of their ids, and the options for `resize`."""
    kept = keep_rows(counts, {t: len(c) // 2 for t, c in counts.items() if len(c) >= LARGE})
    ids, tables = samples.ids.copy(), dict(samples.tables)
    for column, name in enumerate(tables):
        if name in kept:
            new_row, rows = np.full(tables[name], -1), len(kept[name].rows)
            new_row[: len(counts[name])] = kept[name].mapping()
            rest = np.unique(samples.ids[len(samples) * 6 // 10 :, column])
            new = rest[new_row[rest] < 0]
            tables[name] = rows + len(new)
            new_row[new] = np.arange(rows, tables[name])
            ids[:, column] = new_row[ids[:, column]]
    options = [f"--keep={name}={len(selection.rows)}" for name, selection in kept.items()]
    return dataclasses.replace(samples, ids=ids, tables=tables), options


def retrain(
    old: Training, optimizer: str, lr: float, counts: Mapping[str, Tensor], path: Path
) -> None:
    """Prints the figures of each arm; ``path`` is an empty folder."""
    samples = old.samples
    first, stop = len(samples) * 6 // 10, len(samples) * 9 // 10
    half, keep = halve(samples, counts)
    save_counts(path / "counts", counts)
    dcp.save(old.state("rates"), checkpoint_id=path / "old")
    for vocabulary, of, options in (("all", samples, []), ("half", half, keep)):
        options = [*options, *(f"--rows={name}={rows}" for name, rows in of.tables.items())]
        command = ["resize", f"{path}/old", "-o", f"{path}/{vocabulary}", *options]
        with contextlib.redirect_stdout(io.StringIO()):
            assert command_line([*command, "--counts", f"{path}/counts"]) == 0
    for vocabulary, keeps in ARMS:
        of = samples if vocabulary == "all" else half
        new = Training(of, of.tables, optimizer, lr)
        new.adam.load_state_dict(old.adam.state_dict())
        state = new.state(keeps)
        dcp.load(state, checkpoint_id=path / vocabulary)
        new.model.load_state_dict(state["model"], strict=False)
        if keeps == "rates":
            new.model.fused_optimizer.load_state_dict(state["tables"])
        losses, start = [], first
        for steps in STEPS:
            new.train(start, start := min(first + steps * BATCH, stop))
            losses.append(new.judge(stop)[0])
        new.train(start, stop)
        figures = " | ".join(f"{figure:.4f}" for figure in (*losses, *new.judge(stop)))
        rows = sum(of.tables.values())
        print(f"| {optimizer} | {vocabulary} | {keeps} | {rows:,} | {figures} |", flush=True)


def shrink(model: Training, counts: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """AUC of the later samples by the way in which rows are chosen, for each of ``SHARES``."""
    first = len(model.samples) * 6 // 10
    state = model.model.state_dict()
    weights = {
        k.split(".")[-2]: v.local_shards()[0].tensor for k, v in state.items() if "bags" in k
    }
    whole = {name: values.clone() for name, values in weights.items()}
    last = {name: torch.zeros_like(counts_R) for name, counts_R in counts.items()}
    for column, name in enumerate(last):
        last[name][model.samples.ids[:first, column]] = torch.arange(1, first + 1).int()
    orders = {"by count": counts, "by recency": last}
    orders["at random"] = {name: torch.randperm(len(c)) for name, c in counts.items()}
    found: dict[str, list[float]] = {way: [] for way in orders}
    for way, order in orders.items():
        for share in SHARES:
            budget = max(int(sum(map(len, order.values())) * share), len(order))
            for name, kept in keep_budget(order, dict.fromkeys(order, 1), budget).items():
                weights[name].zero_()[kept.rows] = whole[name][kept.rows]
            found[way].append(model.judge(first)[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocabulary", description=__doc__)
    add = parser.add_argument
    add("--task", default="coupons", help="a task of the study (default: %(default)s)")
    add("--samples", type=int, default=200_000, help="at most so many (default: %(default)s)")
    add("--lr", type=float, default=0.1, help="of the tables (default: %(default)s)")
    add("--data", type=Path, default=Path(".data"), help="folder of the data (default: .data)")
    given = parser.parse_args()
    read = load(prepare(given.task, given.data))
    part = {name: getattr(read, name)[: given.samples] for name in ("ids", "dense", "labels")}
    tables = dict(zip(read.tables, (part["ids"].max(axis=0) + 1).tolist(), strict=True))
    samples = dataclasses.replace(read, tables=tables, **part)
    ids = {name: samples.ids[: len(samples) * 6 // 10, n] for n, name in enumerate(tables)}
    counts = count_ids([ids], {name: int(values.max()) + 1 for name, values in ids.items()})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| optimizer | vocabulary | keeps | rows | loss | 10 steps | 50 | all | AUC |")
    found: dict[str, list[float]] = {}
    for optimizer in OPTIMIZERS:
        rows = {name: len(counts_R) for name, counts_R in counts.items()}
        old = Training(samples, rows, optimizer, given.lr)
        old.train(0, len(samples) * 6 // 10)
        with tempfile.TemporaryDirectory() as folder:
            retrain(old, optimizer, given.lr, counts, Path(folder))
        found = found or shrink(old, counts)
    print("\n| rows kept | " + " | ".join(found) + " |")
    for place, share in enumerate(SHARES):
        print(f"| {share:.1%} | {' | '.join(f'{aucs[place]:.4f}' for aucs in found.values())} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
