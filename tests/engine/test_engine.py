"""The engine on a bare TBE: FBGEMM's own kernels, loans, bad ids and gradients, no host reads."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
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
    LearningRateMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_freq import COUNT_CEILING, FrequencyConfig
from torchrec_freq.engine.counting import CountingTBE, Membership
from torchrec_freq.engine.lookups import Batch, has_gradient
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.engine.totals import TableTotals, TotalsTable

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


def counts(tbe: CountingTBE) -> list[Tensor]:
    return [tbe.settled_counts(t).long() for t in range(len(SHAPES))]


def train(tbe: Any, steps: range) -> None:
    for step in steps:
        loss(tbe(*batch(step))).backward()


def same(a: FrequencyTBE, b: FrequencyTBE) -> None:
    """Weights, counts and totals to the last bit."""
    for x, y in zip(a.split_embedding_weights(), b.split_embedding_weights(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(counts(a), counts(b), strict=True):
        assert torch.equal(x, y)
    for tbe in (a, b):
        tbe.totals.settle()
    assert torch.equal(a.totals.values, b.totals.values)
    assert torch.equal(a.totals.ages, b.totals.ages)


def test_equals_fbgemms_counter_sgd() -> None:
    ours = make(FrequencyConfig(count="batches", normalize=None))
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


def test_of_one_row_it_is_fbgemms_rowwise_adagrad() -> None:
    """A row that has had all of its table's squares, with its own square weighted as they are."""
    tables = [(1, 8), (1, 16)]
    config = FrequencyConfig(own_weight=1, count="frozen")
    ours = FrequencyTBE(specs(tables), frequency=config, learning_rate=LR)
    ours.counts.fill_(7)
    ours.totals.values[:, 2] = 7
    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        specs(tables),
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR * 2**0.5,
        eps=1e-8 * 2**0.5,
    )
    for a, b in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        b.copy_(a.uniform_(-0.1, 0.1))
    for step in range(20):
        offsets = torch.tensor([0, 1 + step % 3, 3, 4, 6])
        for tbe in (ours, theirs):
            loss(tbe(torch.zeros(6, dtype=torch.int64), offsets)).backward()
    for a, b in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


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
    tbe.totals.settle()
    assert tbe.counts.sum() == 0 and tbe.totals.ages.tolist() == [0, 0, 0]
    assert not tbe.totals.values[:, 1:].any()


def test_two_backwards_count_twice() -> None:
    tbe = make()
    ids, offsets = batch(0)
    value = loss(tbe(ids, offsets))
    value.backward(retain_graph=True)
    value.backward()
    assert tbe.counts.sum() == 2 * ids.numel()
    tbe.totals.settle()
    assert tbe.totals.ages.tolist() == [2, 2, 2]
    assert tbe.totals.values[:, 2].sum() == 2 * ids.numel()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forwards_then_two_backwards(order: tuple[int, int]) -> None:
    """Both go by the totals of the steps before; the second sees the counts of the first."""
    tbe, one_by_one = make(), make()
    for t in (tbe, one_by_one):
        train(t, range(3))
    gradients = [torch.randn(6, 8 + 3 * 16), torch.randn(6, 8 + 3 * 16)]
    outputs = [tbe(*batch(3)), tbe(*batch(4))]
    for which in order:
        outputs[which].backward(gradients[which])
    # The same one by one, with the totals held at those of the steps before.
    one_by_one.totals.settle()
    before = one_by_one.totals.values.clone()
    for which in order:
        output = one_by_one(*batch(3 + which))
        one_by_one.totals.values.copy_(before)
        output.backward(gradients[which])
    for a, b in zip(
        tbe.split_embedding_weights(), one_by_one.split_embedding_weights(), strict=True
    ):
        assert torch.equal(a, b)
    for x, y in zip(counts(tbe), counts(one_by_one), strict=True):
        assert torch.equal(x, y)


# Between what is lent and what is settled.


def fail_in_the_kernel(tbe: FrequencyTBE, step: int) -> None:
    def fail(grads: Any) -> None:
        raise RuntimeError("injected")

    output = tbe(*batch(step))
    assert output.grad_fn is not None
    output.grad_fn.register_prehook(fail)  # after ours: the kernel does not run
    with pytest.raises(RuntimeError, match="injected"):
        loss(output).backward()


def fail_in_a_second_backward(tbe: FrequencyTBE, step: int) -> None:
    """The kernel finds that its saved tensors are gone."""
    output = tbe(*batch(step))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with hooks:
        value = loss(output)
    value.backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(output, torch.ones_like(output))


FAILURES = [fail_in_the_kernel, fail_in_a_second_backward]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_kernel_loses_no_count(fail: Callable[[FrequencyTBE, int], None]) -> None:
    tbe, sound = make(FrequencyConfig(half_life=4)), make(FrequencyConfig(half_life=4))
    for t in (tbe, sound):
        train(t, range(3))
    fail(tbe, 3)
    if fail is fail_in_a_second_backward:
        train(sound, range(3, 4))  # the first backward of the two was a step
    assert tbe._loan is not None, "the test leaves nothing open"
    assert tbe.counts.max() > 1000, "what is lent looks like counts"
    for a, b in zip(counts(tbe), counts(sound), strict=True):
        assert torch.equal(a, b)
    for t in (tbe, sound):
        train(t, range(4, 8))
    same(tbe, sound)


def test_a_loan_is_closed_by_whoever_comes_next() -> None:
    def opened() -> FrequencyTBE:
        tbe = make()
        train(tbe, range(2))
        fail_in_the_kernel(tbe, 2)
        return tbe

    sound = make()
    train(sound, range(2))
    wanted = counts(sound)

    def check(tbe: FrequencyTBE) -> None:
        for x, y in zip(counts(tbe), wanted, strict=True):
            assert torch.equal(x, y)

    tbe = opened()
    for t, expected in enumerate(wanted):
        assert torch.equal(tbe.counts_of(t).long(), expected)
    check(copy.deepcopy(opened()))
    check(opened().to("cpu"))
    tbe = opened()
    for (state,), expected in zip(tbe.split_optimizer_states(), wanted, strict=True):
        assert state.dtype == torch.int32 and torch.equal(state.long(), expected)
    reset = [torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0])]
    tbe = opened()
    tbe.reset_embedding_weight_momentum(*reset)
    wanted[1][0] = 0
    check(tbe)


def test_readers_during_a_backward_see_the_counts_of_before() -> None:
    tbe = make()
    train(tbe, range(3))
    before = counts(tbe)
    seen: list[list[Tensor]] = []
    output = tbe(*batch(3))

    def read(grads: Any) -> None:
        reader = threading.Thread(target=lambda: seen.append(counts(tbe)))
        reader.start()
        reader.join()

    assert output.grad_fn is not None
    output.grad_fn.register_prehook(read)
    loss(output).backward()
    for x, y in zip(seen[0], before, strict=True):
        assert torch.equal(x, y)
    assert sum(int(c.sum()) for c in counts(tbe)) == sum(len(batch(s)[0]) for s in range(4))


def test_counts_are_never_seen_as_floats() -> None:
    tbe = make()
    train(tbe, range(3))
    wanted = counts(tbe)
    for (state,), expected in zip(tbe.split_optimizer_states(), wanted, strict=True):
        assert state.dtype == torch.int32 and torch.equal(state.long(), expected)
    assert tbe.get_optimizer_state() == [{}, {}, {}]
    weights = {tensor.data_ptr() for tensor in (tbe.weights_host, tbe.weights_dev)}
    for states in tbe.get_all_states():
        assert {state.data_ptr() for state in states[:3] if state.numel()} <= weights
    state = tbe.state_dict()
    assert state["momentum1_host"].dtype == torch.int32
    loaded = make()
    loaded.load_state_dict(state)
    for x, y in zip(counts(loaded), wanted, strict=True):
        assert torch.equal(x, y)
    other = copy.deepcopy(tbe)
    train(tbe, range(3, 5))
    for x, y in zip(counts(other), wanted, strict=True):
        assert torch.equal(x, y)
    train(other, range(3, 5))
    same(tbe, other)
    kept = counts(tbe)
    for cast in (tbe.half, tbe.double, tbe.float):
        cast()
        assert tbe.counts.dtype == torch.int32
        for x, y in zip(counts(tbe), kept, strict=True):
            assert torch.equal(x, y)


# What does not count.


def test_a_bag_without_a_gradient_does_not_count() -> None:
    """As if its ids were not there: weights, counts and totals."""
    masked, without = make(), make()
    ids = torch.tensor([0, 1, 1, 2, 2, 3])
    gradient = torch.randn(2, 8 + 3 * 16)
    gradient[0, 8:24] = 0.0  # the first bag of the second feature
    gradient[1, 24:40] = -0.0  # the second one of the third
    for _ in range(3):
        masked(ids, torch.tensor([0, 1, 1, 3, 4, 4, 5, 5, 6])).backward(gradient)
        without(ids[[0, 3, 5]], torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 3])).backward(gradient)
    same(masked, without)
    assert int(masked.counts.sum()) == 9


def test_weights_of_0_do_not_count() -> None:
    tbe = make()
    ids, offsets = batch(0)
    weights = torch.ones(len(ids))
    weights[::2] = 0
    tbe(ids, offsets, weights).square().sum().backward()
    assert int(tbe.counts.sum()) == len(ids) // 2


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.NONE])
def test_an_output_without_a_gradient_trains_nothing(pooling: PoolingMode) -> None:
    """But what is lent comes back."""
    tbe = FrequencyTBE(specs([(9, 8)]), frequency=FrequencyConfig(), pooling_mode=pooling)
    ids, offsets = torch.tensor([1, 1, 8]), torch.tensor([0, 1, 3])
    tbe(ids, offsets).sum().backward()
    before = tbe.split_embedding_weights()[0].clone()
    for gradient in (torch.zeros(len(tbe(ids, offsets)), 8), None):
        output = tbe(ids, offsets)
        if gradient is None:
            assert output.grad_fn is not None
            tbe._lend(Batch(tbe._indices, tbe._offsets), None)
            tbe._settle()
        else:
            output.backward(gradient)
        assert tbe.counts.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1]
        assert torch.equal(tbe.split_embedding_weights()[0], before)


def test_tiny_gradients_count() -> None:
    """Beside a large past float32 shows nothing of them; they are occurrences all the same."""
    tbe = FrequencyTBE(specs([(4, 8)]), frequency=FrequencyConfig())
    ids, offsets = torch.tensor([1]), torch.tensor([0, 1])
    for size in (1e3, 1e-6, 1e-20):
        tbe(ids, offsets).backward(torch.full((1, 8), size))
    assert tbe.counts.tolist() == [0, 3, 0, 0]


def test_columns_that_only_another_shard_sees_a_gradient_of() -> None:
    """Its counts come to be the same; a feature without a gradient anywhere counts nowhere."""
    for mode in ("samples", "batches"):
        config = FrequencyConfig(count=mode)
        whole = TableTotals([TotalsTable(2, config, split_columns=True)])
        shards = [
            FrequencyTBE(specs([(9, 8)]), frequency=config, feature_table_map=[0, 0])
            for _ in range(2)
        ]
        for index, tbe in enumerate(shards):
            tbe.join(whole, [Membership(0, 0.5, primary=index == 0, first=index == 0)])
        ids, offsets = torch.tensor([1, 1, 8, 1, 5]), torch.tensor([0, 2, 3, 4, 5])
        gradient = torch.zeros(2, 16)
        gradient[0, 2] = 1.0  # the first feature's second bag has none, the second feature none
        for _ in range(2):
            whole.advance()
            shards[0](ids, offsets).backward(torch.zeros(2, 16))
            shards[1](ids, offsets).backward(gradient)
        whole.settle()
        wanted = [0, 4, 0, 0, 0, 0, 0, 0, 2] if mode == "samples" else [0, 2, 0, 0, 0, 0, 0, 0, 2]
        for tbe in shards:
            assert tbe.counts.tolist() == wanted


@pytest.mark.parametrize("dims", [[8], [8, 8, 8], [8, 16, 16, 4], [4, 8, 4]])
def test_has_gradient(dims: list[int]) -> None:
    grad = torch.randn(7, sum(dims)) * (torch.rand(7, sum(dims)) < 0.1)
    grad[0] = torch.nan
    grad[1] = 0
    want = torch.stack([part.ne(0).any(1) for part in grad.split(dims, dim=1)], dim=1)
    assert torch.equal(has_gradient(grad, dims).bool(), want)


# One bad gradient.

POISON = {"NaN": torch.nan, "inf": torch.inf, "1e4": 1e4, "1e20": 1e20}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_one_bad_gradient_does_not_slow_the_other_rows(poison: float) -> None:
    """Ten steps later the others move within 5 % of what they would have."""
    rows, size = 1000, 2048

    def run(make_tbe: Callable[[], Any], bad: float | None) -> Any:
        generator = torch.Generator().manual_seed(0)
        tbe = make_tbe()
        for step in range(16):
            ids = (rows * torch.rand(size, generator=generator) ** 2).long()
            gradient = torch.randn(size, 8, generator=generator)
            if step == 5 and bad is not None:
                gradient[0] = bad
                poisoned = int(ids[0])
            before = tbe.split_embedding_weights()[0].clone()
            tbe(ids, torch.arange(size + 1)).backward(gradient)
        moved = tbe.split_embedding_weights()[0] - before
        if bad is not None:
            assert not torch.equal(moved[poisoned], torch.zeros(8)) or not float(bad) < 1e5
            moved[poisoned] = 0
        return moved.norm(dim=1)

    def ours() -> Any:
        return FrequencyTBE(specs([(rows, 8)]), frequency=FrequencyConfig(), learning_rate=LR)

    def stock() -> Any:
        return SplitTableBatchedEmbeddingBagsCodegen(
            specs([(rows, 8)]), optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=LR
        )

    ratios = {}
    for name, make_tbe in {"FrequencySGD": ours, "RowWiseAdagrad": stock}.items():
        bad, sound = run(make_tbe, poison), run(make_tbe, None)
        both = (bad > 0) & (sound > 0)
        assert int(both.sum()) > rows / 2, "the test moves nothing"
        ratios[name] = (bad[both] / sound[both]).aminmax()
        print(f"{name}: the others move by {ratios[name]} of what they would have")
    low, high = ratios["FrequencySGD"]
    assert low > 0.95 and high < 1.05


def test_empty_batch_is_a_step() -> None:
    tbe = make()
    offsets = torch.zeros(len(FEATURES) * 2 + 1, dtype=torch.int64)
    before = [weight.clone() for weight in tbe.split_embedding_weights()]
    loss(tbe(torch.empty(0, dtype=torch.int64), offsets)).backward()
    tbe.totals.settle()
    assert tbe.totals.ages.tolist() == [1, 1, 1] and tbe.counts.sum() == 0
    for a, b in zip(before, tbe.split_embedding_weights(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_types_agree(dtype: torch.dtype) -> None:
    tbe = make(embedding_table_index_type=dtype, embedding_table_offset_type=dtype)
    wide = make()
    for step in range(3):
        loss(tbe(*batch(step, dtype=dtype))).backward()
        loss(wide(*batch(step))).backward()
    same(tbe, wide)


def test_gradient_of_the_weights_is_the_stock_one() -> None:
    ids, offsets = batch(3)
    ours, stock = make(), make_stock(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
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
    constant = FrequencyConfig(min_count=4**8, normalize=None)
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
    assert ours.counts.sum() == sum(batch(step)[0].numel() for step in range(4))


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
    moved = []
    for lr in (LR, 4 * LR):
        tbe = make()
        before = tbe.split_embedding_weights()[2].clone()
        tbe.set_learning_rate(lr)
        assert tbe.get_learning_rate() == lr
        loss(tbe(*batch(0))).backward()
        moved.append(tbe.split_embedding_weights()[2] - before)
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 4 * moved[0], rtol=1e-5, atol=1e-8)


def test_hyper_parameters_by_fbgemms_other_way() -> None:
    changed, made = make(), make(FrequencyConfig(eps=1e-2))
    changed.update_hyper_parameters({"lr": LR / 2, "eps": 1e-2})
    made.set_learning_rate(LR / 2)
    for tbe in (changed, made):
        train(tbe, range(3))
    same(changed, made)
    with pytest.raises(ValueError, match="weight_decay"):
        changed.update_hyper_parameters({"weight_decay": 0.1})


def test_counter_near_its_ceiling() -> None:
    tbe = make()
    tbe.counts_of(1).fill_(COUNT_CEILING - 1)
    train(tbe, range(3))
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
def test_bad_ids_do_as_in_stock_tables(mode: BoundsCheckMode, bad: int) -> None:
    if mode == BoundsCheckMode.NONE and bad != 11:
        pytest.skip("the stock kernel reads outside its memory")

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
        make_stock(EmbOptimType.EXACT_ROWWISE_ADAGRAD, bounds_check_mode=mode),
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
        assert ours.counts.sum() == 0


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


def test_options_of_another_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient_clipping"):
        make(gradient_clipping=True)
    sgd = make_stock(EmbOptimType.EXACT_SGD)
    with pytest.raises(ValueError, match="EXACT_ROWWISE_ADAGRAD"):
        FrequencyTBE.adopt(sgd, FrequencyConfig())


def test_frozen_counts_must_be_loaded() -> None:
    tbe = make(FrequencyConfig(count="frozen"))
    with pytest.raises(RuntimeError, match="load_row_counts"):
        tbe(*batch(0))
    for t in range(len(SHAPES)):
        tbe.counts_of(t).fill_(3)
    tbe.totals.values[:, 2] = torch.tensor([33.0, 15.0, 120.0])
    train(tbe, range(3))
    assert set(tbe.counts.tolist()) == {3}
    tbe.totals.settle()
    assert tbe.totals.values[:, 2].tolist() == [33.0, 15.0, 120.0]
    assert (tbe.totals.values[:, 1] > 0).all()


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
