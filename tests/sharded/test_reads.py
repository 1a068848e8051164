"""State that is asked for at odd times: within a step, from threads, through other optimizers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import LR, TABLES, Pair, make_batch, sample_loss, to_kjt
from plans import make_plan
from ranks import on_ranks
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from torchrec_freq import row_counts
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.sharded.install import frequency_modules

PLANS = ["table_wise", "row_wise", "column_wise", "data_parallel"]


def totals(model: Any) -> dict[str, list[float]]:
    ((_, handle),) = frequency_modules(model)
    return {name: handle.read(name).totals.tolist() for name in handle.tables}


def saved_totals(state: dict[str, Any]) -> dict[str, list[float]]:
    return {
        name.removesuffix(".table_totals"): values.tolist()
        for table in state["state"].values()
        for name, values in table.items()
        if name.endswith(".table_totals")
    }


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", PLANS)
@on_ranks(2)
def test_a_read_between_forward_and_backward(kind: str, inference: bool) -> None:
    """What the backward adds after it is in the next read."""
    pair = Pair(TABLES, make_plan(kind, TABLES, 2))
    rank = dist.get_rank()
    for _ in range(2):
        features = make_batch(pair.rng, TABLES, 6)
        output = pair.model(to_kjt(features, slice(3 * rank, 3 * rank + 3))).to_dict()
        loss = sample_loss(output).mean()
        with torch.inference_mode(inference):
            row_counts(pair.model)
        loss.backward()
        pair.reference.step(features, lambda rows: sample_loss(rows).mean())
    counts = row_counts(pair.model)
    for name, (_, _, count, _) in totals(pair.model).items():
        assert count == int(counts[name].sum()) > 0
    pair.check()


@pytest.mark.parametrize("kind", PLANS)
@on_ranks(1)
def test_a_thread_that_reads_the_state_in_the_middle_of_a_backward(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 1))
    lend, seen = FrequencyTBE._lend, []

    def lend_and_read(*arguments: Any) -> None:
        lend(*arguments)
        reader = threading.Thread(
            target=lambda: seen.append(copy.deepcopy(pair.model.fused_optimizer.state_dict()))
        )
        reader.start()
        reader.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrequencyTBE, "_lend", lend_and_read)
        for _ in range(3):
            pair.step()
    pair.check()
    assert bool(seen) == (kind != "data_parallel")


@pytest.mark.parametrize("kind", PLANS)
@on_ranks(2)
def test_wrappers_within_a_combined_optimizer(kind: str) -> None:
    """TorchRec's wrappers keep the state of when they were made."""
    pair = Pair(TABLES, make_plan(kind, TABLES, 2))
    clipping = GradientClippingOptimizer(pair.model.fused_optimizer, clipping=GradientClipping.NONE)
    stages = [WarmupStage(policy=WarmupPolicy.CONSTANT, max_iters=1, value=1)]
    optimizer = CombinedOptimizer([("tables", WarmupOptimizer(clipping, stages=stages, lr=LR))])
    for _ in range(3):
        pair.step()
    state = copy.deepcopy(optimizer.state_dict())
    wanted = totals(pair.model)
    found = saved_totals(state)
    assert found and found == {name: wanted[name] for name in found}
    pair.step()
    optimizer.load_state_dict(state)
    assert totals(pair.model) == wanted


@pytest.mark.parametrize("kind", PLANS)
@on_ranks(2)
def test_hyper_parameters(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2))
    optimizer = pair.model.fused_optimizer
    optimizer.update_hyper_parameters({"lr": LR / 2, "eps": 1e-3})
    pair.reference.lr = LR / 2
    for table in pair.reference.tables.values():
        table.eps = 1e-3
    pair.step()
    pair.check()
    ((_, handle),) = frequency_modules(pair.model)
    if handle.shards:
        with pytest.raises(ValueError, match="no weight_decay: only lr and eps"):
            optimizer.update_hyper_parameters({"weight_decay": 0.1})
