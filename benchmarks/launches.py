"""What a step of FrequencySGD launches on a GPU beside row-wise Adagrad's, counted without one.

    python -m benchmarks.launches

The engine runs on fake tensors that say they are on a GPU. An operator that is no mere view is a
kernel launch or more (``repeat_interleave`` scans and then writes). FBGEMM's own kernel is not
among them: it is row-wise Adagrad's.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.timing import Operator, operators
from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.lookups import Batch
from torchrec_freq.engine.tbe import FrequencyTBE

ROWS, DIM, FEATURES, BATCH, IDS = 1_000_000, 64, 26, 2048, 10
PARTS = ("advance", "lend", "settle")


def of_a_step(ids: int = IDS, config: FrequencyConfig | None = None) -> dict[str, list[Operator]]:
    """Operators that the engine adds to a step, by part: the second step, as the first warms up.

    Of ``FEATURES`` tables of ``ROWS`` rows, ``BATCH`` samples and ``ids`` ids a bag.
    """
    gpu, bags = torch.device("cuda"), BATCH * FEATURES
    specs = [(ROWS, DIM, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)] * FEATURES
    with FakeTensorMode():
        tbe = FrequencyTBE(specs, frequency=config or FrequencyConfig(), device=gpu)
        offsets = torch.zeros(bags + 1, dtype=torch.int64, device=gpu)
        batch = Batch(torch.zeros(bags * ids, dtype=torch.int64, device=gpu), offsets)
        gradient = torch.zeros(BATCH, FEATURES * DIM, device=gpu)
        steps: dict[str, Callable[[int], object]] = {
            "advance": lambda _: tbe.totals.advance(),
            "lend": lambda _: tbe._lend(batch, gradient),
            "settle": lambda _: tbe._settle(),
        }
        for _ in range(2):
            found = {part: operators(steps[part]) for part in PARTS}
    return found


def moved(found: dict[str, list[Operator]], ids: int) -> int:
    """Bytes that the operators read and write; of a tensor of all rows those that are looked up."""
    rows, lookups = ROWS * FEATURES, BATCH * FEATURES * ids
    return sum(
        (lookups if elements == rows else elements) * size
        for operator in sum(found.values(), [])
        for elements, size in operator.read + operator.written
    )


@functools.cache
def bytes_each() -> tuple[float, float]:
    """Bytes that the engine's operators move for a lookup, and for a bag besides."""
    few = IDS // 2
    one, two = (moved(of_a_step(ids), ids) for ids in (few, 2 * few))
    a_lookup = (two - one) / (BATCH * FEATURES * few)
    return a_lookup, (one - a_lookup * BATCH * FEATURES * few) / (BATCH * FEATURES)


def main() -> None:
    found = of_a_step()
    for part, of in found.items():
        times = Counter(operator.name for operator in of)
        names = ", ".join(f"{name} x {n}" if n > 1 else name for name, n in times.items())
        print(f"{part}: {len(of)} operators: {names}")
    a_lookup, a_bag = bytes_each()
    print(f"together {sum(map(len, found.values()))} operators, {a_lookup:.0f} bytes a lookup and ")
    print(f"{a_bag:.0f} a bag, of which {4 * DIM} are its gradient of {DIM} columns")


if __name__ == "__main__":
    main()
