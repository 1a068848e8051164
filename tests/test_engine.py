"""The engine on a bare TBE: FBGEMM's own counter kernel, bad ids, autograd, no host reads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    CounterBasedRegularizationDefinition,
    DenseTableBatchedEmbeddingBagsCodegen,
    LearningRateMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_freq import COUNT_CEILING, FrequencyConfig
from torchrec_freq.group import Batch, TableGroup, bag_squares
from torchrec_freq.replicated import ReplicatedTBE
from torchrec_freq.tbe import FrequencyTBE, mean_pooling_weights

SHAPES = [(11, 8), (5, 16), (40, 16)]
FEATURES = [0, 1, 1, 2]
LR = 0.05


def specs(shapes: list[tuple[int, int]] = SHAPES) -> list[Any]:
    return [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in shapes]


def make(config: FrequencyConfig | None = None, **options: Any) -> FrequencyTBE:
    torch.manual_seed(0)
    tbe = FrequencyTBE(
        specs(),
        frequency=config or FrequencyConfig(),
        feature_table_map=FEATURES,
        learning_rate=LR,
        **options,
    )
    tbe.init_embedding_weights_uniform(-0.1, 0.1)
    return tbe


def make_stock(optimizer: EmbOptimType, **options: Any) -> SplitTableBatchedEmbeddingBagsCodegen:
    torch.manual_seed(0)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        specs(), optimizer=optimizer, feature_table_map=FEATURES, learning_rate=LR, **options
    )
    tbe.init_embedding_weights_uniform(-0.1, 0.1)
    return tbe


def batch(seed: int, size: int = 6, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Ids and offsets: skewed, with repetitions and empty bags."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES), size), generator=generator)
    ids = [
        (SHAPES[t][0] * torch.rand(int(n.sum()), generator=generator) ** 2).long()
        for t, n in zip(FEATURES, lengths, strict=True)
    ]
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)))
    return torch.cat(ids).to(dtype), offsets.to(dtype)


def loss(output: Tensor) -> Tensor:
    return (output * torch.linspace(0.5, 1.5, output.shape[1]) - 0.3).square().mean()


def counts(tbe: FrequencyTBE) -> list[Tensor]:
    return [tbe.group.counters.saturated(t).long() for t in range(len(SHAPES))]


def test_equals_fbgemms_counter_sgd() -> None:
    ours = make(FrequencyConfig(count="batches", coherence=0, min_count=1, normalize=None))
    theirs = make_stock(
        EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        eps=0.0,
        weight_decay_mode=WeightDecayMode.COUNTER,
        counter_based_regularization=CounterBasedRegularizationDefinition(
            learning_rate_mode=LearningRateMode.COUNTER_SGD
        ),
    )
    start = [weight.clone() for weight in ours.split_embedding_weights()]
    for step in range(8):
        ids, offsets = batch(step)
        for tbe in (ours, theirs):
            (loss(tbe(ids, offsets)) * 100).backward()
    for t, (a, b) in enumerate(
        zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True)
    ):
        assert (a - start[t]).abs().max() > 1e-2, "the test trains nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        their_counts = theirs.split_optimizer_states()[t][2]
        torch.testing.assert_close(counts(ours)[t], their_counts.long(), rtol=0, atol=0)


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_forward_is_the_stock_forward(pooling: PoolingMode) -> None:
    ids, offsets = batch(0)
    stock = make_stock(EmbOptimType.EXACT_SGD, pooling_mode=pooling)(ids, offsets)
    ours = make(pooling_mode=pooling)
    torch.testing.assert_close(ours(ids, offsets), stock, rtol=0, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, offsets), stock, rtol=0, atol=1e-7)


def test_forward_without_grad_does_not_count() -> None:
    tbe = make()
    with torch.no_grad():
        tbe(*batch(0))
    tbe(*batch(0))  # never followed by a backward
    assert tbe.group.counters.counts.sum() == 0
    assert tbe.group.counters.steps[:, 0].tolist() == [0, 0, 0]


def test_two_backwards_count_twice() -> None:
    tbe = make()
    ids, offsets = batch(0)
    value = loss(tbe(ids, offsets))
    value.backward(retain_graph=True)
    value.backward()
    assert tbe.group.counters.counts.sum() == 2 * ids.numel()
    assert tbe.group.counters.steps[:, 0].tolist() == [2, 2, 2]


def test_backwards_in_another_order_than_forwards() -> None:
    tbe = make(FrequencyConfig(coherence=0, min_count=1, normalize=None))
    other = make(FrequencyConfig(coherence=0, min_count=1, normalize=None))
    first, second = batch(1), batch(2)
    values = [loss(tbe(*first)), loss(tbe(*second))]
    values[1].backward()
    values[0].backward()
    # The same gradients in the other tbe: both are taken at the start.
    frozen = [loss(other(*first)), loss(other(*second))]
    frozen[1].backward()
    frozen[0].backward()
    assert tbe.group.counters.counts.sum() == first[0].numel() + second[0].numel()
    for a, b in zip(counts(tbe), counts(other), strict=True):
        assert torch.equal(a, b)
    expected = torch.zeros(SHAPES[0][0], dtype=torch.int64)
    for ids, offsets in (first, second):
        rows = ids[: int(offsets[6])]
        expected.index_add_(0, rows, torch.ones_like(rows))
    assert torch.equal(counts(tbe)[0], expected)


def test_empty_batch_is_a_step() -> None:
    tbe = make()
    offsets = torch.zeros(len(FEATURES) * 2 + 1, dtype=torch.int64)
    before = [weight.clone() for weight in tbe.split_embedding_weights()]
    loss(tbe(torch.empty(0, dtype=torch.int64), offsets)).backward()
    assert (
        tbe.group.counters.steps[:, 0].tolist() == [1, 1, 1]
        and tbe.group.counters.counts.sum() == 0
    )
    for a, b in zip(before, tbe.split_embedding_weights(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_types_agree(dtype: torch.dtype) -> None:
    tbe = make(embedding_table_index_type=dtype, embedding_table_offset_type=dtype)
    wide = make()
    for step in range(3):
        loss(tbe(*batch(step, dtype=dtype))).backward()
        loss(wide(*batch(step))).backward()
    for a, b in zip(tbe.split_embedding_weights(), wide.split_embedding_weights(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tbe.group.counters.counts, wide.group.counters.counts)


def test_gradient_of_the_weights_is_the_stock_one() -> None:
    ids, offsets = batch(3)
    ours, stock = make(), make_stock(EmbOptimType.EXACT_SGD)
    gradients = []
    for tbe in (ours, stock):
        weights = torch.linspace(0.5, 2, ids.numel()).requires_grad_()
        loss(tbe(ids, offsets, weights)).backward()
        assert weights.grad is not None
        gradients.append(weights.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_type(dtype: torch.dtype) -> None:
    ids, offsets = batch(3)
    weights = torch.linspace(0.5, 2, ids.numel()).to(dtype)
    a, b = make(), make()
    for _ in range(3):
        loss(a(ids, offsets, weights)).backward()
        loss(b(ids, offsets, weights.float())).backward()
    for x, y in zip(a.split_embedding_weights(), b.split_embedding_weights(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "precision",
    [
        SparseType.FP16,
        pytest.param(
            SparseType.BF16, marks=pytest.mark.skip(reason="FBGEMM's CPU kernels have no bfloat16")
        ),
    ],
)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_half_precision_tables(precision: SparseType, pooling: PoolingMode) -> None:
    """While counts stay below min_count the rule is SGD, to the last bit where lr is halved."""
    constant = FrequencyConfig(min_count=4**8, coherence=0, normalize=None)
    options: dict[str, Any] = {"weights_precision": precision, "pooling_mode": pooling}
    ours, stock = make(constant, **options), make_stock(EmbOptimType.EXACT_SGD, **options)
    ours.set_learning_rate(2**8 * LR)
    for a, b in zip(ours.split_embedding_weights(), stock.split_embedding_weights(), strict=True):
        b.copy_(a.normal_(std=0.1, generator=torch.Generator().manual_seed(1)))
    start = [weight.clone() for weight in ours.split_embedding_weights()]
    for step in range(4):
        for tbe in (ours, stock):
            (loss(tbe(*batch(step)).float()) * 100).backward()
    for a, b, c in zip(
        ours.split_embedding_weights(), stock.split_embedding_weights(), start, strict=True
    ):
        assert a.dtype == precision.as_dtype() and not torch.equal(a, c)
        # FBGEMM multiplies by the weights in another order than it divides by the length.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)
    assert ours.group.counters.counts.sum() == sum(batch(step)[0].numel() for step in range(4))


def test_rate_beyond_float16_of_a_sequence() -> None:
    """Gradients near float16's least: the multiplier is more than it holds, the update is not."""
    tbe = FrequencyTBE(
        specs([(4, 8)]),
        frequency=FrequencyConfig(min_count=1, coherence=0),
        learning_rate=LR,
        pooling_mode=PoolingMode.NONE,
        output_dtype=SparseType.FP16,
    )
    (weight,) = tbe.split_embedding_weights()
    weight.zero_()
    output = tbe(torch.tensor([1]), torch.tensor([0, 1]))
    output.backward(torch.full_like(output, 2e-6))
    expected = torch.zeros(4, 8)
    expected[1] = -LR
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=0)


def test_evicted_rows_start_anew() -> None:
    """As zero-collision hashing calls it: the second feature's table, then the fourth's."""
    tbe = make()
    loss(tbe(*batch(0))).backward()
    before = counts(tbe)
    tbe.reset_embedding_weight_momentum(
        pruned_indices=torch.tensor([0, 1, 2, 3]),
        pruned_indices_offsets=torch.tensor([0, 1, 4]),
        logical_table_ids=torch.tensor([2, 3]),
        buffer_ids=torch.tensor([0, 1]),
    )
    assert before[1][0] > 0 and before[2][1:4].sum() > 0, "the test evicts nothing"
    before[1][0] = 0
    before[2][1:4] = 0
    for a, b in zip(counts(tbe), before, strict=True):
        assert torch.equal(a, b)


def test_learning_rate_reaches_the_kernel() -> None:
    config = FrequencyConfig(coherence=0, min_count=1, normalize=None)
    moved = []
    for lr in (LR, 4 * LR):
        tbe = make(config)
        before = tbe.split_embedding_weights()[2].clone()
        tbe.set_learning_rate(lr)
        loss(tbe(*batch(0))).backward()
        moved.append(tbe.split_embedding_weights()[2] - before)
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 4 * moved[0], rtol=1e-3, atol=1e-8)


def test_counter_near_its_ceiling() -> None:
    tbe = make(FrequencyConfig(coherence=0, min_count=1, normalize=None))
    start = torch.full((SHAPES[1][0],), COUNT_CEILING - 1)
    tbe.group.counters.table(1).copy_(start)
    for step in range(3):
        loss(tbe(*batch(step))).backward()
    assert counts(tbe)[1].max() == COUNT_CEILING
    assert counts(tbe)[1].min() >= COUNT_CEILING - 1
    assert all(weight.isfinite().all() for weight in tbe.split_embedding_weights())


BAD_IDS = {"too large": 11, "far too large": 2**40, "negative": -1}


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize(
    "mode",
    [
        BoundsCheckMode.WARNING,
        BoundsCheckMode.IGNORE,
        BoundsCheckMode.FATAL,
        BoundsCheckMode.NONE,
    ],
)
def test_bad_ids_do_as_in_stock_sgd(mode: BoundsCheckMode, bad: int) -> None:
    if mode == BoundsCheckMode.NONE and bad != 11:
        pytest.skip("stock SGD reads outside its memory")

    def run(tbe: Any) -> str:
        ids, offsets = batch(0)
        ids = ids.clone()
        ids[0] = bad
        try:
            for _ in range(2):
                loss(tbe(ids.clone(), offsets)).backward()
        except (RuntimeError, IndexError) as error:
            return type(error).__name__
        moved = tbe.split_embedding_weights()[0] - start
        return str(sorted(moved.abs().sum(1).nonzero().flatten().tolist()))

    ours, stock = (
        make(bounds_check_mode=mode),
        make_stock(EmbOptimType.EXACT_SGD, bounds_check_mode=mode),
    )
    start = ours.split_embedding_weights()[0].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run(ours)
        assert outcome == run(stock)
    ids, offsets = batch(0)
    first_table = int(offsets[6])
    if outcome.startswith("["):
        # The bad id was replaced by FBGEMM, and counts where it was put.
        assert counts(ours)[0].sum() == 2 * first_table
        assert counts(ours)[1].sum() + counts(ours)[2].sum() == 2 * (ids.numel() - first_table)
    else:
        assert ours.group.counters.counts.sum() == 0


class NoHostRead(TorchDispatchMode):
    """Raises on every operator whose result the host has to wait for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.FORBIDDEN):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


CONFIGS = {
    "full": FrequencyConfig(half_life=2, min_count=1),
    "batches": FrequencyConfig(count="batches"),
    "paper": FrequencyConfig(coherence=0, min_count=1, normalize=None),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
def test_hot_path_reads_nothing_from_the_device(
    config: FrequencyConfig, pooling: PoolingMode
) -> None:
    if pooling == PoolingMode.NONE:
        tbe = FrequencyTBE(specs([(9, 8)]), frequency=config, pooling_mode=pooling)
        ids, offsets = torch.tensor([1, 1, 8]), torch.tensor([0, 1, 3])
    else:
        tbe = make(config, pooling_mode=pooling)
        ids, offsets = batch(0)
    with NoHostRead():
        for _ in range(3):
            tbe(ids, offsets).sum().backward()
    assert tbe.group.counters.counts.sum() > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_replicated_tables_read_nothing_from_the_device(
    config: FrequencyConfig, pooling: PoolingMode
) -> None:
    tbe = ReplicatedTBE.adopt(
        DenseTableBatchedEmbeddingBagsCodegen(
            SHAPES, feature_table_map=FEATURES, pooling_mode=pooling, use_cpu=True
        ),
        config,
        FEATURES,
        LR,
        None,
    )
    before = tbe.weights.detach().clone()
    ids, offsets = batch(0)
    with NoHostRead():
        for _ in range(3):
            tbe(ids, offsets).sum().backward()
            assert tbe.weights.grad is not None
            tbe.apply(tbe.weights.grad)
    assert tbe.group.counters.counts.sum() > 0
    assert not torch.equal(before, tbe.weights.detach())


def test_no_host_read_detects_one() -> None:
    with NoHostRead(), pytest.raises(AssertionError, match="wait"):
        torch.ones(3).sum().item()


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_functions_on_a_fake_gpu(config: FrequencyConfig, pooled: bool) -> None:
    with FakeTensorMode():
        gpu = torch.device("cuda")
        dims = [8, 16, 16] if pooled else [8, 8, 8]
        group = TableGroup(config, [11, 5, 40], dims, FEATURES, pooled=pooled, device=gpu)
        offsets = torch.zeros(4 * 6 + 1, dtype=torch.int64, device=gpu)
        ids = torch.zeros(30, dtype=torch.int64, device=gpu)
        grad = torch.zeros((6, 8 + 3 * 16) if pooled else (30, 8), device=gpu)
        weights_L = mean_pooling_weights(offsets, None, 30)
        for _ in range(3):
            multiplier_L = group.step(Batch(ids, offsets, weights_L if pooled else None), grad)
        assert multiplier_L is not None
        for tensor in (weights_L, multiplier_L, group.counters.counts, group.scales.totals):
            assert tensor.device.type == "cuda"
        assert multiplier_L.shape == (30,) and multiplier_L.dtype == torch.float32


@pytest.mark.parametrize("dims", [[8], [8, 8, 8], [8, 16, 16, 4], [4, 8, 4]])
def test_bag_squares(dims: list[int]) -> None:
    grad = torch.randn(5, sum(dims))
    want = torch.stack([part.square().sum(1) for part in grad.split(dims, dim=1)])
    torch.testing.assert_close(bag_squares(grad, dims), want)


def test_options_of_another_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient_clipping"):
        make(gradient_clipping=True)
    adagrad = make_stock(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    with pytest.raises(ValueError, match="EXACT_SGD"):
        FrequencyTBE.adopt(adagrad, FrequencyConfig())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_cuda_equals_cpu(pooling: PoolingMode) -> None:
    def on(device: str) -> FrequencyTBE:
        place = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
        compute = ComputeDevice.CPU if device == "cpu" else ComputeDevice.CUDA
        return FrequencyTBE(
            [(rows, dim, place, compute) for rows, dim in SHAPES],
            frequency=FrequencyConfig(half_life=3),
            feature_table_map=FEATURES,
            learning_rate=LR,
            pooling_mode=pooling,
        )

    cpu, gpu = on("cpu"), on("cuda")
    torch.manual_seed(0)
    for a, b in zip(cpu.split_embedding_weights(), gpu.split_embedding_weights(), strict=True):
        b.copy_(a.uniform_(-0.1, 0.1))
    for step in range(5):
        ids, offsets = batch(step)
        loss(cpu(ids, offsets)).backward()
        output = gpu(ids.cuda(), offsets.cuda())
        scale = torch.linspace(0.5, 1.5, output.shape[1], device="cuda")
        (output * scale - 0.3).square().mean().backward()
    assert torch.equal(cpu.group.counters.counts, gpu.group.counters.counts.cpu())
    for a, b in zip(cpu.split_embedding_weights(), gpu.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
