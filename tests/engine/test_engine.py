"""The engine on a bare TBE, beside the plain-torch reference and FBGEMM's own kernels."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    LearningRateMode,
    WeightDecayMode,
)
from tables import (
    LR,
    SHAPES,
    Plain,
    batch,
    counts,
    loss,
    make,
    make_stock,
    same,
    same_weights,
    train,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.bench.measure import measure
from torchrec_freq import COUNT_CEILING, FrequencyConfig
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.rule import FIRST_STEPS, sample_weight

RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "row-wise Adagrad": {"prior_count": 0},
    "little prior": {"prior_count": 1},
    "frequency alone": {"prior_count": math.inf},
    "half-life": {"half_life": 80},
    "admit": {"admit": 9},
    "admit without a prior": {"admit": 9, "prior_count": 0},
    "together": {"prior_count": 3, "half_life": 30, "admit": 4, "eps": 1e-2},
    "paper": {"normalize": None},
    "bounded": {"normalize": None, "min_count": 5, "eps": 0.1, "half_life": 30, "admit": 2},
    "frozen": {"normalize": None, "count": "frozen"},
}
WIDE = [(11, 16), (5, 16), (40, 16)]
INT32 = {"embedding_table_index_type": torch.int32, "embedding_table_offset_type": torch.int32}
LAYOUTS: dict[str, dict[str, Any]] = {
    "unequal": {},
    "equal": {"length": 2},
    "one feature": {"shapes": [(40, 16)], "features": [0]},
    "int32": {"dtype": torch.int32, **INT32},
    "weighted": {"weighted": True},
    "mean": {"pooling_mode": PoolingMode.MEAN, "weighted": True},
    "sequence": {"pooling_mode": PoolingMode.NONE, "shapes": WIDE},
}


@pytest.mark.parametrize(
    ("rule", "layout"),
    [(rule, "unequal") for rule in RULES]
    + [("default", layout) for layout in LAYOUTS if layout != "unequal"]
    + [("paper", "weighted"), ("paper", "equal")],
)
def test_the_rule(rule: str, layout: str) -> None:
    """100 steps, so that some are not sampled; two of them are empty."""
    torch.manual_seed(0)
    options = dict(LAYOUTS[layout])
    batches = {k: options.pop(k) for k in list(options) if k in ("length", "dtype")}
    batches |= {k: v for k, v in options.items() if k in ("shapes", "features")}
    weighted = options.pop("weighted", False)
    tbe = make(FrequencyConfig(**RULES[rule]), **options)
    reference = Plain(tbe, **RULES[rule])
    if rule == "frozen":
        tbe.counts.copy_(torch.arange(len(tbe.counts)))
        for table, frozen in zip(reference.tables, counts(tbe), strict=True):
            table.counts = Counter(dict(enumerate(frozen)))
    start = [weight.clone() for weight in tbe.split_embedding_weights()]
    for step in range(100):
        empty = {"length": 0} if step in (7, 70) else {}
        ids, offsets = batch(step, **(batches | empty))
        weights = torch.rand(len(ids)) * 2 if weighted else None
        output = tbe(ids, offsets, weights)
        output.retain_grad()
        loss(output).backward()
        reference.step(ids, offsets, output.grad, weights, tbe.pooling_mode)
    for before, after in zip(start, tbe.split_embedding_weights(), strict=True):
        assert (after - before).abs().max() > 0.1, "the test trains nothing"
    reference.check(tbe)


# FBGEMM's own kernels, and TorchRec's class.


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize(
    ("pooling", "weighted"),
    [*((mode, False) for mode in PoolingMode), (PoolingMode.SUM, True)],
)
def test_without_a_prior_it_is_fbgemms_rowwise_adagrad(
    pooling: PoolingMode, weighted: bool, precision: SparseType
) -> None:
    """To the last bit: outputs, gradients of the lookups' weights, tables and sums."""
    options: dict[str, Any] = {"pooling_mode": pooling, "weights_precision": precision}
    config = FrequencyConfig(prior_count=0, eps=1e-3)
    tbes = make(config, WIDE, **options), make_stock(shapes=WIDE, eps=1e-3, **options)
    seen = torch.zeros(56, dtype=torch.int64)
    for step in range(20):
        ids, offsets = batch(step)
        seen += make(config).features.look_up(ids, offsets).rows_L.bincount(minlength=56)
        weights = [torch.linspace(0.5, 2, len(ids)).requires_grad_() for _ in tbes]
        outputs = [
            t(ids, offsets, w if weighted else None) for t, w in zip(tbes, weights, strict=True)
        ]
        for output in outputs:
            loss(output.float()).backward()
        assert torch.equal(*outputs)
        if weighted:
            assert weights[0].grad is not None and weights[1].grad is not None
            assert torch.equal(weights[0].grad, weights[1].grad)
    ours, stock = tbes
    assert torch.equal(ours.counts, seen.int())
    same_weights(ours, stock)
    for (x,), (y,) in zip(
        ours.split_optimizer_states(), stock.split_optimizer_states(), strict=True
    ):
        assert torch.equal(x, y) and x.max() > 0


def test_without_a_prior_it_is_torchrecs_rowwise_adagrad() -> None:
    tbe = make(FrequencyConfig(prior_count=0), [(40, 16)], [0])
    table = nn.EmbeddingBag(40, 16, mode="sum", include_last_offset=True)
    table.weight.data.copy_(tbe.split_embedding_weights()[0])
    optimizer = RowWiseAdagrad(table.parameters(), lr=LR, eps=1e-8)
    for step in range(40):
        for lookup in (tbe, table):
            optimizer.zero_grad()
            loss(lookup(*batch(step, [(40, 16)], [0]))).backward()
        optimizer.step()
    torch.testing.assert_close(tbe.split_embedding_weights()[0], table.weight, rtol=0, atol=1e-6)
    sums = optimizer.state[table.weight]["sum"].flatten()
    torch.testing.assert_close(tbe.sums, sums, rtol=1e-5, atol=1e-7)


def test_papers_rule_is_fbgemms_counter_sgd() -> None:
    """On batches in which no id occurs twice: FBGEMM counts batches."""
    rule = CounterBasedRegularizationDefinition(learning_rate_mode=LearningRateMode.COUNTER_SGD)
    counter: dict[str, Any] = {"counter_based_regularization": rule, "eps": 0.0}
    ours = make(FrequencyConfig(normalize=None), features=[0, 1, 2])
    theirs = make_stock(features=[0, 1, 2], weight_decay_mode=WeightDecayMode.COUNTER, **counter)
    for _ in range(8):
        ids = torch.cat([torch.randperm(rows)[:4] for rows, _ in SHAPES])
        for tbe in (ours, theirs):
            (loss(tbe(ids, torch.arange(13))) * 10).backward()
    for t, states in enumerate(theirs.split_optimizer_states()):
        assert counts(ours)[t] == states[2].tolist()
    torch.testing.assert_close(
        ours.split_embedding_weights(), theirs.split_embedding_weights(), rtol=0, atol=1e-6
    )


# What counts, and when.


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.NONE])
def test_every_occurrence_counts(pooling: PoolingMode) -> None:
    """With weight 0, without a part in the loss, and of an id that pads, whose gradient is 0."""
    tbe = make(shapes=WIDE, pooling_mode=pooling)
    reference, seen = Plain(tbe), torch.zeros(56, dtype=torch.int64)
    for step in range(5):
        ids, offsets = batch(step, WIDE)
        seen += tbe.features.look_up(ids, offsets).rows_L.bincount(minlength=56)
        weights = (ids > 0).float() if pooling == PoolingMode.SUM else None
        output = tbe(ids, offsets, weights)
        output.retain_grad()
        used = output[1:] if weights is not None else output[ids > 0]
        loss(used).backward()
        reference.step(ids, offsets, output.grad, weights, pooling)
    assert tbe.counts.tolist() == seen.tolist()
    reference.check(tbe)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forwards_then_two_backwards(order: tuple[int, int]) -> None:
    tbe, one_by_one = make(), make()
    gradients = torch.randn(2, 4, 8 + 3 * 16)
    for t in (tbe, one_by_one):
        train(t, range(3))
    outputs = [tbe(*batch(3)), tbe(*batch(4))]
    for which in order:
        outputs[which].backward(gradients[which])
        one_by_one(*batch(3 + which)).backward(gradients[which])
    same(tbe, one_by_one)


def test_two_lookups_in_one_backward_are_one_step() -> None:
    tbe = make()
    (loss(tbe(*batch(0))) + loss(tbe(*batch(1)))).backward()
    lookups = len(batch(0)[0]) + len(batch(1)[0])
    assert tbe.counts.sum() == lookups and tbe.totals.values[:, 2].sum() == lookups
    assert tbe.totals.ages.tolist() == [1, 1, 1] == tbe.totals.values[:, 3].tolist()


def test_a_second_backward_is_a_second_step() -> None:
    tbe, twice = make(), make()
    gradient = torch.randn(4, 8 + 3 * 16)
    output = tbe(*batch(0))
    output.backward(gradient, retain_graph=True)
    output.backward(gradient)
    for _ in range(2):
        twice(*batch(0)).backward(gradient)
    same(tbe, twice)


def test_only_what_is_differentiated_counts() -> None:
    tbe, untouched = make(), make()
    with torch.no_grad():
        tbe(*batch(0))
        tbe.eval()(*batch(0))
    tbe(*batch(0))  # never followed by a backward
    same(tbe, untouched)
    for t in (tbe, untouched):  # eval() alone changes nothing, as in FBGEMM's
        train(t, range(1))
    same(tbe, untouched)


# What must do no harm.


POISON = {"NaN": torch.nan, "inf": torch.inf, "1e4": 1e4, "1e20": 1e20}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_one_bad_gradient_leaves_the_other_rows_their_rates(poison: float) -> None:
    """Rows that are known, and rows that come after it, move as far as without it."""
    rows, size = 1000, 512

    def moved(tbe: Any, bad: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        (weight,) = tbe.split_embedding_weights()
        for step in range(60):
            known = rows if step > 20 else rows // 2
            ids = (known * torch.rand(size, generator=generator) ** 2).long()
            gradient = torch.randn(size, 8, generator=generator)
            if step == 20:
                gradient[0] *= bad
                poisoned = int(ids[0])
            tbe(ids, torch.arange(size + 1)).backward(gradient)
            if step == 20:
                before = weight.clone()
        distance: Tensor = (weight - before).norm(dim=1)
        distance[poisoned] = 0
        return distance

    one: dict[str, Any] = {"shapes": [(rows, 8)], "features": [0]}
    for name, kind in {"RowWiseAdagrad": make_stock, "FrequencySGD": make}.items():
        bad, sound = moved(kind(**one), poison), moved(kind(**one), 1.0)
        assert torch.equal(bad > 0, sound > 0) and (sound > 0).sum() > 0.9 * rows
        ratios = (bad / sound).nan_to_num(1.0).split(rows // 2)
        spread = [tuple(map(float, part.aminmax())) for part in ratios]
        print(f"{name}: known and young rows move by {spread} of what they would have")
    assert all(0.9 < low <= high < 1.1 for low, high in spread)


def test_a_failed_kernel_harms_no_other_row() -> None:
    tbe, sound = make(), make()
    for t in (tbe, sound):
        train(t, range(3))

    def fail(_: Any) -> None:
        raise RuntimeError("injected")

    output = tbe(*batch(3))
    assert output.grad_fn is not None
    output.grad_fn.register_prehook(fail)  # after ours, before the kernel
    with pytest.raises(RuntimeError, match="injected"):
        loss(output).backward()
    same_weights(tbe, sound)
    occurred = tbe.features.look_up(*batch(3)).rows_L.bincount(minlength=56)
    assert torch.equal(tbe.counts, sound.counts + occurred)
    others = occurred == 0
    assert torch.equal(tbe.sums[others], sound.sums[others]) and tbe.sums.isfinite().all()
    gradient = torch.randn(4, 8 + 3 * 16)
    for t in (tbe, sound):
        t(*batch(4)).backward(gradient)
    moved, wanted = (
        torch.cat([w.sum(1) for w in t.split_embedding_weights()]) for t in (tbe, sound)
    )
    assert torch.equal(moved[others], wanted[others])
    train(tbe, range(5, 9))
    assert all(weight.isfinite().all() for weight in tbe.split_embedding_weights())


def test_who_reads_or_trains_in_the_middle_of_a_backward() -> None:
    """Sees a mixture of two estimates; afterwards counts and sums are as one after the other."""
    tbe, one_by_one = make(), make()
    gradients = torch.randn(2, 4, 8 + 3 * 16)
    copies: list[FrequencyTBE] = []

    def interfere(_: Any) -> None:
        def work() -> None:
            tbe.split_optimizer_states()
            copies.append(copy.deepcopy(tbe))
            tbe(*batch(4)).backward(gradients[1])

        other = threading.Thread(target=work)
        other.start()
        other.join()

    for t in (tbe, one_by_one):
        train(t, range(3))
    output = tbe(*batch(3))
    output.grad_fn.register_prehook(interfere)
    output.backward(gradients[0])
    for step in (4, 3):
        one_by_one(*batch(step)).backward(gradients[step - 3])
    assert torch.equal(tbe.counts, one_by_one.counts)
    torch.testing.assert_close(tbe.sums, one_by_one.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tbe.totals.values, one_by_one.totals.values, rtol=1e-5, atol=0)
    for t in (tbe, *copies):
        train(t, range(5, 9))
        assert all(weight.isfinite().all() for weight in t.split_embedding_weights())


@pytest.mark.parametrize("rule", ["default", "row-wise Adagrad", "admit without a prior", "paper"])
def test_a_row_beyond_the_ceiling(rule: str) -> None:
    """10^10 lookups of one row: its count stays at the ceiling, and no rate changes by that."""
    tbe = make(FrequencyConfig(**RULES[rule]))
    reference = Plain(tbe, **RULES[rule])
    first = reference.tables[0]
    first.counts[0], first.sums[0] = 10**10, torch.full((8,), 3e9).double()
    tbe.counts[0], tbe.sums[0] = COUNT_CEILING - 1, 3e9
    first.squares, first.total, first.steps = 3e9, 1e10, 1e6
    for table in reference.tables:
        table.age = 1022  # counts are looked after in every 1024th step
    tbe.totals.ages.fill_(1022)
    tbe.totals.values[0] = torch.tensor([3, 3e9, 1e10, 1e6])
    for step in range(3):
        output = tbe(*batch(step))
        output.retain_grad()
        loss(output).backward()
        reference.step(*batch(step), output.grad)
    assert counts(tbe)[0] == [COUNT_CEILING, *first.count_tensor()[1:].tolist()]
    weights = tbe.split_embedding_weights()[0].double()
    torch.testing.assert_close(weights[1:], first.weight[1:], rtol=0, atol=1e-6)
    # Under the paper's rule the count is the rate.
    torch.testing.assert_close(weights[0], first.weight[0], rtol=0, atol=1e-5)


BAD_IDS = {"too large": 11, "far too large": 2**40, "negative": -1}
MODES = [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE, BoundsCheckMode.FATAL]


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize("mode", MODES)
def test_bad_ids_do_as_in_stock_tables(mode: BoundsCheckMode, bad: int) -> None:
    """What FBGEMM puts in their place counts."""
    config, (ids, offsets) = FrequencyConfig(prior_count=0), batch(0)
    ids[0] = bad
    tbes = make(config, bounds_check_mode=mode), make_stock(bounds_check_mode=mode)
    errors = []
    for tbe in tbes:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss(tbe(ids.clone(), offsets)).backward()
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    assert errors[0] == errors[1]
    same_weights(*tbes)
    assert tbes[0].counts.sum() == (0 if errors[0] else len(ids))


# What it costs.


class Operators(TorchDispatchMode):
    """The names of operators that are no views, and do more than to allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_like", "new_empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def step_of(tbe: Any, layout: str, size: int = 4) -> tuple[Callable[[int], object], int]:
    """A step, and its lookups."""
    ids, offsets = batch(0, size=size, length=None if layout == "unequal" else 2)
    return lambda _: tbe(ids, offsets).backward(torch.ones(size, 8 + 3 * 16)), len(ids)


@pytest.mark.parametrize("layout", ["equal", "unequal"])
def test_operators_of_a_step(layout: str) -> None:
    """At most 20 more than row-wise Adagrad's, 22 after a sampled one, 44 in it."""
    ours, (step, _) = make(), step_of(make_stock(), layout)
    with Operators() as stock:
        step(0)
    step, _ = step_of(ours, layout)
    after = True
    for age in range(FIRST_STEPS, FIRST_STEPS + 20):
        ours.totals.ages.fill_(age)
        with Operators() as found:
            step(0)
        more = Counter(found.names) - Counter(stock.names)
        most = 44 if sample_weight(age) else 22 if after else 20
        if age > FIRST_STEPS:
            assert sum(more.values()) <= most, (age, found.names)
        after = sample_weight(age) > 0


@pytest.mark.parametrize("layout", ["equal", "unequal"])
def test_memory_of_a_step(layout: str) -> None:
    """At most 160 bytes a lookup beside row-wise Adagrad's, where it is sampled too."""
    peaks = {}
    for name, tbe in {"ours": make(), "stock": make_stock()}.items():
        step, lookups = step_of(tbe, layout, 4096)
        found = measure({name: step}, torch.device("cpu"), lookups, turns=1, warm_up=0)
        peaks[name] = found[name].bytes_peak
    assert peaks["ours"] - peaks["stock"] <= 160 * lookups


# Settings and state.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_lookup_weights_of_another_type(dtype: torch.dtype) -> None:
    ids, offsets = batch(3)
    weights = torch.linspace(0.5, 2, len(ids)).to(dtype)
    a, b = make(), make()
    for _ in range(3):
        loss(a(ids, offsets, weights)).backward()
        loss(b(ids, offsets, weights.float())).backward()
    same(a, b)


@pytest.mark.parametrize("rule", ["default", "paper"])
def test_hyper_parameters_reach_the_kernel(rule: str) -> None:
    changed, made = (
        make(FrequencyConfig(**RULES[rule])),
        make(FrequencyConfig(**RULES[rule], eps=1e-2), learning_rate=LR / 2),
    )
    changed.update_hyper_parameters({"lr": LR / 4, "eps": 1e-2})
    assert changed.get_learning_rate() == LR / 4
    changed.set_learning_rate(LR / 2)
    assert changed.get_learning_rate() == LR / 2
    for tbe in (changed, made):
        train(tbe, range(3))
    same(changed, made)
    with pytest.raises(ValueError, match="no weight_decay here: only eps, lr"):
        changed.update_hyper_parameters({"weight_decay": 0.1})


def test_what_the_kernel_ignores_is_refused() -> None:
    for option in ({"gradient_clipping": True}, {"weight_decay": 0.1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            make(**option)
    with pytest.raises(ValueError, match="EXACT_ROWWISE_ADAGRAD"):
        FrequencyTBE.adopt(make_stock(EmbOptimType.EXACT_SGD), FrequencyConfig())
    with pytest.raises(RuntimeError, match="load_row_counts"):
        make(FrequencyConfig(normalize=None, count="frozen"))(*batch(0))


def test_casts_keep_sums_and_counts_exact() -> None:
    tbe = make()
    train(tbe, range(3))
    kept, seen = tbe.sums.clone(), tbe.counts.clone()
    for cast in (tbe.half, tbe.double, tbe.float, lambda: tbe.to("cpu")):
        cast()
        assert tbe.sums.dtype == torch.float32 and torch.equal(tbe.sums, kept)
        assert torch.equal(tbe.counts, seen)


@pytest.mark.parametrize("steps", [1, 2, 70])
def test_a_copy_and_a_loaded_state_go_on(steps: int) -> None:
    tbe, loaded = make(), make()
    train(tbe, range(steps))
    copied = copy.deepcopy(tbe)
    loaded.load_state_dict(tbe.state_dict())
    # These belong to the sharded module.
    loaded.totals.values.copy_(tbe.totals.values)
    loaded.totals.ages.copy_(tbe.totals.ages)
    for t in (tbe, copied, loaded):
        train(t, range(steps, steps + 4))
    same(tbe, copied)
    same(tbe, loaded)


def test_rows_that_are_reset() -> None:
    """Of the second feature's table, then of the fourth's: their counts and sums, and no others."""
    tbe = make()
    train(tbe, range(3))
    wanted, sums = tbe.counts.clone(), tbe.sums.clone()
    evicted = torch.tensor([11, 17, 18, 19])
    assert (wanted[evicted] > 0).any() and (sums[evicted] > 0).any(), "the test evicts nothing"
    tbe.reset_embedding_weight_momentum(
        pruned_indices=torch.tensor([0, 1, 2, 3]),
        pruned_indices_offsets=torch.tensor([0, 1, 4]),
        logical_table_ids=torch.tensor([2, 3]),
        buffer_ids=torch.tensor([0, 1]),
    )
    wanted[evicted], sums[evicted] = 0, 0.0
    assert torch.equal(tbe.counts, wanted) and torch.equal(tbe.sums, sums)
