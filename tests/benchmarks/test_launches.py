"""What a step adds to row-wise Adagrad's on a GPU, to the operator and to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.launches import BATCH, DIM, FEATURES, bytes_each, of_a_step
from benchmarks.timing import operators
from torchrec_freq import FrequencyConfig
from torchrec_freq.engine import fused

BUDGET = {
    "advance": "new_zeros",
    # The last step's sums, and the rates; the rows; who was trained; counts, and what is lent.
    "lend": """
        add_ div nan_to_num_ _to_copy mul threshold
        clone sub repeat_interleave index_select add
        linalg_vector_norm ne _to_copy clone sub repeat_interleave index_select
        index_select scatter_add_ index_select sub clamp_ div index_select mul scatter_
    """,
    # What the kernel added, and what of it enters the sums; the counts; the sums by feature.
    "settle": """
        index_select sub index_select div nan_to_num minimum mul
        scatter_ segment_sum_csr segment_sum_csr
        _to_copy _to_copy stack index_add_
    """,
}
"""The operators of a step in their order. Who adds one has to say here what it is for."""


def test_operators_of_a_step() -> None:
    found = of_a_step()
    names = {part: [operator.name for operator in of] for part, of in found.items()}
    assert names == {part: text.split() for part, text in BUDGET.items()}
    # The number that docs/cost.md gives.
    assert sum(map(len, names.values())) == 42


def test_operators_of_what_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result: list[Any] = []
            inside.append(len(operators(lambda _: result.append(function(*arguments)))))
            return result[0]

        return run

    monkeypatch.setattr(fused, "_choose", counted)
    step = of_a_step()  # the second of two
    assert len(inside) == 12
    # Each is one kernel then: the number that docs/cost.md gives.
    assert sum(map(len, step.values())) - sum(inside[6:]) + 6 == 22


def test_operators_of_a_step_with_many_lookups_of_a_feature() -> None:
    """They are parted, so that a GPU has more than a block for each."""
    names = Counter(operator.name for of in of_a_step(17).values() for operator in of)
    # Where the parts begin; their lengths, and features; two sums over parts.
    more = Counter("arange mul floor_divide add cat sub bitwise_right_shift_ sum sum".split())
    assert names == Counter(" ".join(BUDGET.values()).split()) + more


def test_operators_by_settings() -> None:
    numbers = {
        config: sum(len(of) for of in of_a_step(ids, config).values())
        for ids, config in (
            (1, FrequencyConfig()),
            (10, FrequencyConfig(normalize=None)),
            (10, FrequencyConfig(count="frozen")),
            (10, FrequencyConfig(count="batches")),
        )
    }
    assert list(numbers.values()) == [42, 38, 43, 51]


def test_bytes_of_a_lookup_and_a_bag() -> None:
    """By hand, operator after operator: what each reads, and what it writes."""
    wide, number = 8, 4  # int64; int32 or float32
    of_a_table = wide + number  # read by the number of the table, written
    gather = wide + number + number
    rows = wide + (wide + wide) + 3 * wide  # table repeated; its first row; plus the id
    trained = wide + of_a_table  # bag repeated; what it says
    scatter = wide + number + number
    count = gather + (scatter + number) + gather + 3 * number + 2 * number
    lend = of_a_table + 3 * number + scatter
    settle = gather + 3 * number + scatter
    enter = of_a_table + 3 * number + 2 * number + 3 * number + 3 * number
    sums = number + number
    a_lookup, a_bag = bytes_each()
    assert a_lookup == rows + trained + count + lend + settle + enter + sums == 288
    norm = DIM * number + number
    flags = (number + 1) + (1 + number) + 2 * number  # not 0; as int32; feature by feature
    repeated = 3 * wide + wide + number  # lengths; read to be repeated; read by lookup
    of_tables = FEATURES * 1000 / (BATCH * FEATURES)  # a few hundred bytes a table are a step's
    assert norm + flags + repeated <= a_bag < norm + flags + repeated + of_tables
