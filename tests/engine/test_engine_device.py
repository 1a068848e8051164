"""Nothing waits for the device, on a fake GPU whose values nobody can read; and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
)
from tables import FEATURES, LR, SHAPES, batch, counts, loss, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.counting import Membership
from torchrec_freq.engine.lookups import Batch
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.engine.totals import TableTotals, TotalsTable

# Nothing waits for the device: on a fake GPU, whose values nobody can read.


class NoCopyToTheHost(TorchDispatchMode):
    """Raises where a tensor of the fake GPU is copied to the CPU, which a fake tensor would let."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if func in copies and any(isinstance(a, Tensor) and a.is_cuda for a in args):
            assert result.is_cuda, f"{func} makes the host wait for the device"
        return result


CONFIGS = {
    "full": FrequencyConfig(half_life=2),
    "batches": FrequencyConfig(count="batches"),
    "paper": FrequencyConfig(normalize=None, min_count=2),
}
GPU = torch.device("cuda")


def fake(kind: type[Any], config: FrequencyConfig, pooling: PoolingMode, split: bool) -> Any:
    """A TBE of ours without FBGEMM's own parts, on the fake GPU."""
    tbe: Any = object.__new__(kind)
    nn.Module.__init__(tbe)
    tbe.embedding_specs = [(r, d if pooling != PoolingMode.NONE else 8) for r, d in SHAPES]
    tbe.pooling_mode = pooling
    rows = sum(rows for rows, _ in SHAPES)
    tbe.momentum1_host, tbe.momentum1_dev = torch.zeros(0), torch.zeros(rows, device=GPU)
    tbe._counts, tbe._loan = torch.zeros(rows, dtype=torch.int32, device=GPU), None
    tbe._start(config, FEATURES, GPU)
    if split:
        tables = [TotalsTable(FEATURES.count(t), config, True) for t in range(len(SHAPES))]
        tbe.join(TableTotals(tables, GPU), [Membership(t, 0.5) for t in range(len(SHAPES))])
    return tbe


@pytest.mark.parametrize("kind", ["plain", "weights", "variable", "split", "unused"])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.NONE])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nothing_waits_for_the_device(
    config: FrequencyConfig, pooling: PoolingMode, kind: str
) -> None:
    with FakeTensorMode(), NoCopyToTheHost():
        tbe = fake(FrequencyTBE, config, pooling, kind == "split")
        offsets = torch.zeros(4 * 6 + 1, dtype=torch.int64, device=GPU)
        ids = torch.zeros(30, dtype=torch.int64, device=GPU)
        weights = torch.zeros(30, device=GPU) if kind == "weights" else None
        starts = torch.zeros(5, dtype=torch.int64, device=GPU) if kind == "variable" else None
        shape = (30, 8) if pooling == PoolingMode.NONE else (6, 8 + 3 * 16)
        grad = None if kind == "unused" else torch.zeros(shape, device=GPU)
        for _ in range(3):
            tbe.totals.advance()
            tbe._lend(Batch(ids, offsets, weights, starts), grad)
            assert tbe._loan.lent_L.is_cuda and tbe._loan.lent_L.dtype == torch.float32
            tbe._settle()
        assert tbe.totals.rates()[0].is_cuda and tbe.counts.is_cuda


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_replicated_tables_wait_for_nothing(config: FrequencyConfig) -> None:
    with FakeTensorMode(), NoCopyToTheHost():
        tbe = fake(ReplicatedTBE, config, PoolingMode.SUM, False)
        sizes = [rows * dim for rows, dim in SHAPES]
        tbe.weights_physical_offsets = [sum(sizes[:t]) for t in range(len(sizes))]
        tbe.weights, tbe.learning_rate = torch.zeros(sum(sizes), device=GPU), LR
        tbe._process_group, tbe._occurrences = None, []
        offsets = torch.zeros(4 * 6 + 1, dtype=torch.int64, device=GPU)
        for _ in range(3):
            tbe.totals.advance()
            batch_ = Batch(torch.zeros(30, dtype=torch.int64, device=GPU), offsets)
            tbe._count(batch_, torch.zeros(6, 8 + 3 * 16, device=GPU))
            tbe.apply(torch.zeros(sum(sizes), device=GPU))
        assert tbe.counts.is_cuda


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.zeros(4).copy_(x),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_fake_gpu_notices_who_waits(read: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode(), NoCopyToTheHost(), pytest.raises((RuntimeError, AssertionError)):
        read(torch.ones(4, device=GPU))


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on(device: str, place: EmbeddingLocation, **options: Any) -> FrequencyTBE:
    cpu = device == "cpu"
    compute = ComputeDevice.CPU if cpu else ComputeDevice.CUDA
    torch.manual_seed(0)
    tbe = FrequencyTBE(
        [(rows, dim, EmbeddingLocation.HOST if cpu else place, compute) for rows, dim in SHAPES],
        frequency=FrequencyConfig(half_life=3),
        feature_table_map=FEATURES,
        learning_rate=LR,
        **options,
    )
    for weight in tbe.split_embedding_weights():
        weight.copy_(torch.empty(weight.shape).uniform_(-0.1, 0.1))
    return tbe


@needs_cuda
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize(
    "place",
    [EmbeddingLocation.DEVICE, EmbeddingLocation.MANAGED, EmbeddingLocation.MANAGED_CACHING],
)
def test_cuda_equals_cpu(
    place: EmbeddingLocation, pooling: PoolingMode, deterministic: bool
) -> None:
    cpu, gpu = (on(device, place, pooling_mode=pooling) for device in ("cpu", "cuda"))
    torch.use_deterministic_algorithms(deterministic)
    try:
        for step in range(5):
            ids, offsets = batch(step)
            loss(cpu(ids, offsets)).backward()
            if place == EmbeddingLocation.MANAGED_CACHING:
                gpu.prefetch(ids.cuda(), offsets.cuda())
            output = gpu(ids.cuda(), offsets.cuda())
            column = torch.linspace(0.5, 1.5, output.shape[1], device="cuda")
            (output * column - 0.3).square().mean().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    gpu.flush()
    for a, b in zip(counts(cpu), counts(gpu), strict=True):
        assert torch.equal(a, b.cpu())
    for a, b in zip(cpu.split_embedding_weights(), gpu.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)


@needs_cuda
def test_cuda_backward_on_another_stream() -> None:
    one, two = on("cuda", EmbeddingLocation.DEVICE), on("cuda", EmbeddingLocation.DEVICE)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for step in range(6):
        ids, offsets = (tensor.cuda() for tensor in batch(step))
        loss_of = lambda output: (output - 0.3).square().mean()  # noqa: E731
        loss_of(one(ids, offsets)).backward()
        stream = streams[step % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss_of(two(ids, offsets)).backward()
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    same(one, two)


@needs_cuda
def test_cuda_variable_batch_per_feature() -> None:
    cpu, gpu = (on(device, EmbeddingLocation.DEVICE) for device in ("cpu", "cuda"))
    sizes = [[3], [1], [2], [4]]
    offsets = torch.tensor([0, 1, 3, 3, 5, 6, 6, 7, 9, 10, 12])
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([11] * 3 + [5] * 3 + [40] * 6)
    for _ in range(3):
        ids = (rows * torch.rand(12, generator=generator)).long()
        for tbe, device in ((cpu, "cpu"), (gpu, "cuda")):
            output = tbe(ids.to(device), offsets.to(device), batch_size_per_feature_per_rank=sizes)
            (output - 0.3).square().mean().backward()
    for a, b in zip(counts(cpu), counts(gpu), strict=True):
        assert torch.equal(a, b.cpu())
    for a, b in zip(cpu.split_embedding_weights(), gpu.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
