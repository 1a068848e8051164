"""Training that starts from another run's checkpoint: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from criteo_runs import BATCH, STEPS, built, content, run, write
from ranks import on_ranks
from torch import Tensor
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES

from torchrec_freq import adagrad_sums, row_counts

ADAGRAD = ("--optimizer.name", "RowWiseAdagrad")


def last(out: Path, step: int = STEPS) -> str:
    return str(out / "checkpoints" / f"step-{step:08}")


@on_ranks(2)
def test_there_and_back(tmp_path: Path) -> None:
    """Weights, the dense layers' Adam, and each row's sum, under other plans; then by its own."""
    data, old, new, back = (tmp_path / name for name in ("data", "old", "new", "back"))
    if dist.get_rank() == 0:
        write(data)
    dist.barrier()
    still = ("--optimizer.lr", "0", "--optimizer.dense_lr", "0", "--max_steps", "1")
    run(data, old, *ADAGRAD, "--planner.sharding", "[column_wise]")
    run(data, new, "--init_from", last(old), *still, "--planner.sharding", "[row_wise,table_wise]")
    run(data, back, "--init_from", last(new, 1), *ADAGRAD, *still)
    before, ours, after = content(old), content(new, 1), content(back, 1)

    def counted(tensors: dict[str, Tensor], name: str) -> Any:
        return next(v for k, v in tensors.items() if k.endswith(f"{name}.row_counter"))

    for path, tensor in before.items():
        if path.startswith("/model"):
            assert torch.equal(ours[path], tensor) and torch.equal(after[path], tensor)
        elif path.endswith(".momentum1"):  # a step at lr 0 adds its squares
            for found in (ours[path], after[path]):
                assert (found >= tensor).all() and found.sum() < 1.5 * tensor.sum()
    for name in DEFAULT_CAT_NAMES:
        counts = counted(ours, name)
        assert counts.sum() > BATCH, "derived from the sums, and counted on"
    # The run has checkpoints of its own from then on.
    assert run(data, new, "--init_from", last(old), *still[:-1], "3")["steps"] == 3


@on_ranks(1)
def test_other_models_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    run(data, tmp_path / "old", *ADAGRAD, "--max_steps", "2")
    old = last(tmp_path / "old", 2)
    for more, message in [
        (("--init_from", old, "--model.dim", "16"), "of another model, or damaged"),
        (("--init_from", str(tmp_path)), "metadata"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(data, tmp_path / "new", *more)
    training = built(data, tmp_path / "new")
    assert not any(counts.any() for counts in row_counts(training.model).values())
    assert not any(sums.any() for sums in adagrad_sums(training.model).values())
