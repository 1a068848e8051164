"""What is lent to the kernel comes back, whoever comes next, and is never seen as floats."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import batch, counts, loss, make, same, train
from torch import Tensor

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.tbe import FrequencyTBE


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
    assert tbe.get_optimizer_state() == []
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


def test_two_threads_at_once_are_refused() -> None:
    """Their kernels would add floats to the other's counts."""
    tbe, alone = make(), make()
    errors: list[BaseException] = []

    def train_too() -> None:
        try:
            train(tbe, range(5, 6))
        except RuntimeError as error:
            errors.append(error)

    output = tbe(*batch(0))

    def interfere(grads: Any) -> None:  # after the loan, before the kernel
        other = threading.Thread(target=train_too)
        other.start()
        other.join()

    assert output.grad_fn is not None
    output.grad_fn.register_prehook(interfere)
    loss(output).backward()
    assert len(errors) == 1 and "Train them in one thread" in str(errors[0])
    train(alone, range(1))
    same(tbe, alone)
