"""The engine on a bare TBE: FBGEMM's own kernels, what counts, bad ids and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    LearningRateMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from tables import FEATURES, LR, SHAPES, batch, counts, loss, make, make_stock, same, specs, train

from torchrec_freq import COUNT_CEILING, FrequencyConfig
from torchrec_freq.engine.counting import Membership
from torchrec_freq.engine.lookups import Batch, has_gradient
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.engine.totals import TableTotals, TotalsTable


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
