"""Nothing waits for the device, on a fake GPU whose values nobody can read; and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice
from tables import FEATURES, LR, SHAPES, batch, counts, fill, loss, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.engine.totals import TableTotals


class NoCopyToTheHost(TorchDispatchMode):
    """Raises where a tensor of the fake GPU is copied to the CPU, which a fake tensor would let."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if func in copies and any(isinstance(a, Tensor) and a.is_cuda for a in args):
            assert result.is_cuda, f"{func} makes the host wait for the device"
        return result


CONFIGS = {
    "default": FrequencyConfig(half_life=2),
    "admit": FrequencyConfig(admit=3),
    "row-wise Adagrad": FrequencyConfig(prior_count=0),
    "paper": FrequencyConfig(normalize=None, min_count=2),
}
GPU = torch.device("cuda")


def on_the_host(totals: TableTotals) -> None:
    """Their ages, which are on the CPU: no fake tensor."""
    totals.ages = np.zeros(len(SHAPES), dtype=np.int64)  # type: ignore[assignment]


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nothing_waits_for_the_device(config: FrequencyConfig, variable: bool) -> None:
    specs = [(*shape, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for shape in SHAPES]
    with FakeTensorMode():
        tbe = FrequencyTBE(specs, frequency=config, feature_table_map=FEATURES, device=GPU)
        on_the_host(tbe.totals)
        offsets = torch.zeros(4 * 6 + 1, dtype=torch.int64, device=GPU)
        ids = torch.zeros(30, dtype=torch.int64, device=GPU)
        starts = torch.zeros(5, dtype=torch.int64, device=GPU) if variable else None
        tbe.totals.end_with_backward = lambda: None  # type: ignore[method-assign]
        with NoCopyToTheHost():
            for _ in range(3):
                tbe._restore(tbe._predict(ids, offsets, starts))
                tbe.totals.end_step()
        assert tbe.sums.is_cuda and tbe.counts.is_cuda and tbe.totals.rho().is_cuda


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_replicated_tables_wait_for_nothing(
    config: FrequencyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FBGEMM's own parts are left out: its dense TBE asks for a real GPU; so do streams, copies."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(Tensor, "copy_", Tensor.add_)
    with FakeTensorMode():
        tbe: Any = object.__new__(ReplicatedTBE)
        nn.Module.__init__(tbe)
        tbe.embedding_specs, sizes = SHAPES, [rows * dim for rows, dim in SHAPES]
        tbe._start(config, FEATURES, GPU)
        on_the_host(tbe.totals)
        tbe._sums = torch.zeros_like(tbe.counts, dtype=torch.float32)
        tbe.weights_physical_offsets = [sum(sizes[:t]) for t in range(len(sizes))]
        tbe.weights, tbe.learning_rate = torch.zeros(sum(sizes), device=GPU), LR
        tbe._process_group, tbe._occurrences = None, []
        ids = torch.zeros(30, dtype=torch.int64, device=GPU)
        with NoCopyToTheHost():
            for _ in range(3):
                tbe._count(ids, torch.zeros(25, dtype=torch.int64, device=GPU), None)
                tbe.apply(torch.zeros(sum(sizes), device=GPU))
        assert tbe.sums.is_cuda and tbe.counts.is_cuda


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.zeros(4).copy_(x),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_fake_gpu_notices_who_waits(read: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode(), NoCopyToTheHost(), pytest.raises((RuntimeError, AssertionError)):
        read(torch.ones(4, device=GPU))


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on(
    device: str, place: EmbeddingLocation = EmbeddingLocation.DEVICE, **options: Any
) -> FrequencyTBE:
    where = (place, ComputeDevice.CUDA)
    if device == "cpu":
        where = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    tbe = FrequencyTBE(
        [(rows, dim, *where) for rows, dim in SHAPES],
        frequency=FrequencyConfig(half_life=3, admit=2),
        feature_table_map=FEATURES,
        learning_rate=LR,
        **options,
    )
    fill(tbe)
    return tbe


def check(cpu: FrequencyTBE, gpu: FrequencyTBE) -> None:
    gpu.flush()
    assert counts(cpu) == counts(gpu)
    pairs = [(cpu.sums, gpu.sums), (cpu.totals.values, gpu.totals.values)]
    for a, b in pairs:
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)
    for a, b in zip(cpu.split_embedding_weights(), gpu.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)


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
            loss(gpu(ids.cuda(), offsets.cuda())).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    check(cpu, gpu)


@needs_cuda
def test_cuda_backward_on_another_stream() -> None:
    one, two = on("cuda"), on("cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for step in range(6):
        ids, offsets = (tensor.cuda() for tensor in batch(step))
        loss(one(ids, offsets)).backward()
        stream = streams[step % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss(two(ids, offsets)).backward()
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    same(one, two)


@needs_cuda
def test_cuda_variable_batch_per_feature() -> None:
    cpu, gpu = on("cpu"), on("cuda")
    sizes = [[3], [1], [2], [4]]
    offsets = torch.tensor([0, 1, 3, 3, 5, 6, 6, 7, 9, 10, 12])
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([11] * 3 + [5] * 3 + [40] * 6)
    for _ in range(3):
        ids = (rows * torch.rand(12, generator=generator)).long()
        for tbe, device in ((cpu, "cpu"), (gpu, "cuda")):
            output = tbe(ids.to(device), offsets.to(device), batch_size_per_feature_per_rank=sizes)
            (output - 0.3).square().mean().backward()
    check(cpu, gpu)
