"""The processes that tests run on: what is left behind, and what comes after a failure."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, run_on_ranks

PIDS = "pid"


def all_meet(folder: Path | None = None) -> None:
    ranks = torch.ones(1)
    dist.all_reduce(ranks)
    assert int(ranks) == dist.get_world_size()
    if folder is not None:
        (folder / f"{PIDS}-{dist.get_rank()}").write_text(str(os.getpid()))


def pids(folder: Path, ranks: int) -> list[int]:
    """Of the processes that serve the next test."""
    run_on_ranks(ranks, all_meet, {"folder": folder})
    return [int((folder / f"{PIDS}-{rank}").read_text()) for rank in range(ranks)]


def test_processes_live_on(tmp_path: Path) -> None:
    four = pids(tmp_path, 4)
    assert pids(tmp_path, 2) == four[:2] and pids(tmp_path, 4) == four
    assert os.getpid() not in four and len(set(four)) == 4


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("of rank 1")
    all_meet()  # nobody comes


def be_killed() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    all_meet()


def leave() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    all_meet()


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    all_meet()


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (fail_on_rank_1, r"(?s)^rank 1 of 2:\nTraceback.*in fail_on_rank_1.*KeyError: 'of rank 1'"),
        (be_killed, "^rank 0 of 2: killed by SIGKILL"),
        (leave, "^rank 0 of 2: exit code 3"),
        (hang, "^the ranks did not end within 2 s"),
    ],
)
def test_a_failure_harms_no_later_test(failing: Any, message: str, tmp_path: Path) -> None:
    before = pids(tmp_path, 3)
    with pytest.raises(AssertionError, match=message):
        run_on_ranks(2, failing, {}, timeout=2)
    after = pids(tmp_path, 3)
    assert not set(before) & set(after)
    for pid in before:
        assert not Path(f"/proc/{pid}").exists()


@on_ranks(4, hosts=2)
def leave_traces(folder: Path) -> None:
    from torchrec.distributed.comm import intra_and_cross_node_pg

    for group in intra_and_cross_node_pg(torch.device("cpu")):
        assert group is not None and group.size() == 2
    os.environ["LEFT"] = "1"
    os.chdir(folder)
    torch.manual_seed(folder.stat().st_ino)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    warnings.simplefilter("error")


def write_state(folder: Path) -> None:
    from torchrec.distributed import comm

    state = [
        comm.get_local_size(),
        [comm._INTRA_PG, comm._CROSS_PG],
        os.environ.get("LEFT"),
        os.getcwd(),
        torch.rand(2).tolist(),
        torch.is_grad_enabled(),
        [f for f in warnings.filters if f[0] == "error"],
    ]
    (folder / f"state-{dist.get_rank()}").write_text(str(state))


def states(folder: Path) -> list[str]:
    run_on_ranks(2, write_state, {"folder": folder})
    return [(folder / f"state-{rank}").read_text() for rank in range(2)]


def test_what_a_test_sets_is_taken_back(tmp_path: Path) -> None:
    before = states(tmp_path)
    assert before[0].startswith("[2, [None, None], None, ")
    leave_traces(folder=tmp_path)
    assert states(tmp_path) == before
