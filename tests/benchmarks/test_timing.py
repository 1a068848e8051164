"""Timing as on a GPU, with a GPU that only writes down what it is told."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import timing
from benchmarks.timing import Measured, measure, spent

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Gpu:
    """Its clock ticks a millisecond a step; its memory is what the steps say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now = self.peak = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                gpu.log.append("record")
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                assert gpu.log[-1] != "record", "read before the device is done"
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def step(self, name: str, ms: float) -> Any:
        def run(batch: int) -> None:
            self.log.append(f"{name} {batch}")
            self.now += ms
            self.peak = 1000 + 10 * ms

        return run


def kernel(name: str, kind: DeviceType, count: int, us: float, annotation: bool = False) -> Any:
    return SimpleNamespace(
        key=name,
        device_type=kind,
        count=count,
        self_device_time_total=us,
        self_cpu_time_total=us / 2,
        is_user_annotation=annotation,
    )


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of four steps as CUDA gives it: kernels, and the operators that launched them."""
    events = [
        kernel("aten::add", DeviceType.CPU, 8, 800.0),
        kernel("add_kernel", DeviceType.CUDA, 8, 800.0),
        kernel("Memcpy DtoD", DeviceType.CUDA, 4, 40.0),
        kernel("## forward ##", DeviceType.CUDA, 4, 5000.0, annotation=True),
    ]

    @contextlib.contextmanager
    def profile() -> Iterator[Any]:
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)


def test_the_host_waits_for_no_step(monkeypatch: pytest.MonkeyPatch, profiled: None) -> None:
    gpu = Gpu(monkeypatch)
    found = measure({"a": gpu.step("a", 1), "b": gpu.step("b", 2)}, GPU, turns=12, warm_up=2)
    # Two steps to warm up, then twelve turns of both between two events each, and then a wait.
    assert gpu.log[:4] == ["a 0", "b 0", "a 1", "b 1"]
    timed = gpu.log[4 : gpu.log.index("wait")]
    assert len(timed) == 12 * 2 * 3 and timed[::3] == timed[2::3] == ["record"] * 24
    turns = [set(timed[1::3][i : i + 2]) for i in range(0, 24, 2)]
    assert turns == [{f"a {turn % 4}", f"b {turn % 4}"} for turn in range(12)]
    assert len({timed[1::3][i][0] for i in range(0, 24, 2)}) == 2, "always the same goes first"
    assert found["a"] == Measured([1.0] * 12, 10, 0, 3.0, 0.2 + 0.01)
    assert found["b"].ms == [2.0] * 12 and found["b"].peak_bytes == 20


def test_kernels_count_once(profiled: None) -> None:
    """Not again with the operator that launched them, nor with a name given to a stretch."""
    found = spent(lambda batch: None, CPU, 4)
    assert found == {"aten::add": (2.0, 0.1)}
    with pytest.MonkeyPatch.context() as patch:
        Gpu(patch)
        found = spent(lambda batch: None, GPU, 4)
    assert found == {"add_kernel": (2.0, 0.2), "Memcpy DtoD": (1.0, 0.01)}


def test_it_stops_when_the_time_is_over() -> None:
    def step(batch: int) -> None:
        time.sleep(0.001)

    over = measure({"a": step}, CPU, turns=100, deadline=time.monotonic() - 1, warm_up=0)
    assert len(over["a"].ms) == 8
    assert len(measure({"a": step}, CPU, turns=10, warm_up=0)["a"].ms) == 10


def test_garbage_of_an_earlier_step_is_not_taken_off_the_peak() -> None:
    def leave(_: int) -> None:
        garbage: list[Any] = [torch.empty(13)]
        garbage.append(garbage)

    def step(_: int) -> None:
        gc.collect()
        torch.empty(256)

    gc.disable()  # or it is collected before the step, by chance
    try:
        timing._peak(leave, CPU)
        assert timing._peak(step, CPU) == 1024
    finally:
        gc.enable()
