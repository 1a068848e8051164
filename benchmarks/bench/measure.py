"""Times steps that take turns, and says what they compute and how much memory they take.

What disturbs the machine disturbs all of them, so times are compared within a turn.
"""

import gc
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TURN: Final = 8
"""Steps of a turn: FrequencySGD samples the squares of a table in one step of eight."""
WARM_UP: Final = 72
"""Steps before the first turn: FrequencySGD samples in all of the first 64."""

# What the profiler writes to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Step = Callable[[int], object]
"""A step of training, given its number."""


@dataclass(frozen=True)
class Measured:
    """What the steps of an optimizer take.

    Attributes:
        ms: mean of a step, by turn.
        operators: torch operators of a step that compute or copy; the fewest and the most of a
            turn's steps. Those inside FBGEMM's and DDP's own operators are not seen.
        bytes_moved: what these operators read and write, in a step with the fewest.
        bytes_peak: most memory that a turn takes besides what is there before.
    """

    ms: list[float]
    operators: tuple[int, int]
    bytes_moved: int
    bytes_peak: int


def measure(
    steps: dict[str, Step],
    device: torch.device,
    lookups: int,
    turns: int,
    warm_up: int = WARM_UP,
) -> dict[str, Measured]:
    """Lets the steps take turns, in an order that changes from step to step.

    Args:
        lookups: of a step; of a tensor that has more elements, so many are read.
        turns: of eight steps each.
        warm_up: steps before.
    """
    order, rng = list(steps), random.Random(0)
    timed: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    for number in range(warm_up + turns * TURN):
        rng.shuffle(order)  # the same on every rank
        for name in order:
            timed[name].append(_timed(steps[name], number, device))
    _wait(device)
    found = {}
    for name, step in steps.items():
        ms = [elapsed() for elapsed in timed[name][warm_up:]]
        computed = [_operators(step, number, lookups) for number in range(TURN)]
        found[name] = Measured(
            ms=[sum(ms[i : i + TURN]) / TURN for i in range(0, len(ms), TURN)],
            operators=(min(computed)[0], max(computed)[0]),
            bytes_moved=min(computed)[1],
            bytes_peak=_peak(step, device),
        )
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Step, number: int, device: torch.device) -> Callable[[], float]:
    """Runs a step; what is returned tells its milliseconds, once the device is done.

    On CUDA events time it, so the host does not wait.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(number)
        end.record()
        return lambda: float(begin.elapsed_time(end))
    start = time.perf_counter()
    step(number)
    ms = (time.perf_counter() - start) * 1e3
    return lambda: ms


def _peak(step: Step, device: torch.device) -> int:
    """Bytes that a turn needs at once, besides those that were allocated before it."""
    gc.collect()  # what is left of earlier steps would be freed in these, and taken off their peak
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for number in range(TURN):
            step(number)
        _wait(device)
        peak: int = torch.cuda.max_memory_allocated(device) - before
        return peak
    with torch.profiler.profile(profile_memory=True) as profile:
        for number in range(TURN):
            step(number)
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


class _Recorder(TorchDispatchMode):
    """Counts the operators that compute or copy, and the bytes that they read and write."""

    # They allocate, ask for the device, or are views of what is contiguous.
    IDLE: Final = {"empty", "empty_like", "new_empty", "device", "_unsafe_view"}

    def __init__(self, lookups: int) -> None:
        super().__init__()
        self.lookups = lookups
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.IDLE:
            # What is scattered into is written only.
            read = args[1:] if name == "scatter_" else args
            for leaf in tree_leaves((read, kwargs, result)):
                if isinstance(leaf, Tensor):
                    self.bytes += min(leaf.numel(), self.lookups) * leaf.element_size()
            self.operators += 1
        return result


def _operators(step: Step, number: int, lookups: int) -> tuple[int, int]:
    """How many operators a step has, and the bytes that they read and write."""
    with _Recorder(lookups) as recorder:
        step(number)
    return recorder.operators, recorder.bytes
