"""Times steps that take turns, and says what they run and how much memory they take.

What disturbs the machine disturbs all of them, so figures are compared within a turn. On CUDA steps
are timed by events, and the host waits for none of them; otherwise by the clock.
"""

import contextlib
import gc
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCHES = 4  # different batches that take turns

Step = Callable[[int], object]
"""Trains on one of the ``BATCHES``."""


@dataclass
class Measured:
    """What the steps of an optimizer take.

    Attributes:
        ms: of each turn.
        peak_bytes: most memory that a step takes besides what is there before.
        operators: torch operators of a step that are no mere views; those inside FBGEMM's and DDP's
            own operators are not seen.
        kernels: what a step runs on the GPU, copies included; 0 without one.
        kernel_ms: time within them; where a step takes much longer, the GPU waits for its host.
    """

    ms: list[float]
    peak_bytes: int
    operators: int
    kernels: float
    kernel_ms: float


def measure(
    steps: dict[str, Step],
    device: torch.device,
    turns: int,
    deadline: float = math.inf,
    warm_up: int = 4,
) -> dict[str, Measured]:
    """Lets the steps take turns, in an order that changes.

    Args:
        turns: so many, or fewer where the clock (``time.monotonic``) has passed ``deadline``.
    """
    order, rng = list(steps), random.Random(0)
    for turn in range(warm_up):
        for name in order:
            steps[name](turn % BATCHES)
    timed: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    for turn in range(turns):
        if turn and turn % 8 == 0 and _over(deadline, device):
            break
        rng.shuffle(order)  # the same on every rank
        for name in order:
            timed[name].append(_timed(steps[name], turn % BATCHES, device))
    _wait(device)
    found = {}
    for name, step in steps.items():
        kernels = list(spent(step, device, BATCHES).values()) if device.type == "cuda" else []
        found[name] = Measured(
            [ms() for ms in timed[name]],
            _peak(step, device),
            len(operators(step)),
            sum(times for times, _ in kernels),
            sum(ms for _, ms in kernels),
        )
    return found


def _over(deadline: float, device: torch.device) -> bool:
    """Whether the time is over, on any rank."""
    over = time.monotonic() > deadline
    if dist.is_initialized():
        ranks = torch.tensor(int(over), device=device)
        dist.all_reduce(ranks)
        over = bool(ranks)
    return over


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Step, batch: int, device: torch.device) -> Callable[[], float]:
    """Runs a step; what is returned tells its milliseconds, once the device is done."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(batch)
        end.record()
        return lambda: float(begin.elapsed_time(end))
    start = time.perf_counter()
    step(batch)
    ms = (time.perf_counter() - start) * 1e3
    return lambda: ms


def spent(
    step: Step, device: torch.device, steps: int, warm_up: int = 0
) -> dict[str, tuple[float, float]]:
    """How often a step runs each kernel, without a GPU each operator, and its ms within it."""
    on_gpu = device.type == "cuda"
    kind, where = (DeviceType.CUDA, "device") if on_gpu else (DeviceType.CPU, "cpu")
    for _ in range(warm_up + 1):  # the profiler has to warm up, too
        with _quiet(), torch.profiler.profile() as profile:
            for number in range(steps):
                step(number % BATCHES)
            _wait(device)
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in profile.key_averages():
        if event.device_type != kind or event.is_user_annotation:
            continue  # on a GPU an operator's time is that of its kernels, which come by themselves
        # What autograd spends on an operator is a part of it.
        name = event.key.removeprefix("autograd::engine::evaluate_function: ")
        times, ms = found[name]
        more = getattr(event, f"self_{where}_time_total") / (1e3 * steps)
        found[name] = times + event.count / steps, ms + more
    return dict(found)


def _peak(step: Step, device: torch.device) -> int:
    """Bytes that a step needs at once, besides those that were allocated before it."""
    gc.collect()  # what is left of earlier steps would be freed in this one, and taken off its peak
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(0)
        _wait(device)
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


@dataclass(frozen=True)
class Operator:
    """One that launches.

    Attributes:
        read, written: tensors, as (elements, bytes an element).
    """

    name: str
    read: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]


# They allocate, ask for the device, or are views of what is contiguous.
_NO_LAUNCH = {"empty", "empty_like", "new_empty", "device", "_unsafe_view"}


class _Recorder(TorchDispatchMode):
    """Records the operators that launch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_LAUNCH:
            # What is scattered into is written only.
            inputs = args[1:] if name == "scatter_" else args
            self.found.append(Operator(name, _sizes((inputs, kwargs)), _sizes(result)))
        return result


def _sizes(tree: Any) -> tuple[tuple[int, int], ...]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return tuple((tensor.numel(), tensor.element_size()) for tensor in tensors)


def operators(step: Callable[[int], object]) -> list[Operator]:
    """Those of ``step(0)``; what FBGEMM's and DDP's own operators do inside is not seen."""
    with _Recorder() as recorder:
        step(0)
    found: list[Operator] = recorder.found
    return found
