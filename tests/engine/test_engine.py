"""The engine on a bare TBE, beside the plain-torch reference and FBGEMM's own kernels."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from tables import Plain, batch, counts, loss, make

from torchrec_freq import FrequencyConfig

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
    + [(rule, layout) for rule in ("default", "paper") for layout in LAYOUTS if layout > "u"]
    + [("default", layout) for layout in LAYOUTS if layout < "u"],
)
def test_the_rule(rule: str, layout: str) -> None:
    """100 steps, so that some are not sampled; two of them are empty."""
    options = dict(LAYOUTS[layout])
    batches = {k: options.pop(k) for k in ("length", "dtype") if k in options}
    batches |= {k: options[k] for k in ("shapes", "features") if k in options}
    weighted = options.pop("weighted", False)
    tbe = make(FrequencyConfig(**RULES[rule]), **options)
    reference = Plain(tbe, **RULES[rule])
    if rule == "frozen":
        tbe.counts.copy_(torch.arange(len(tbe.counts)))
        for table, frozen in zip(reference.tables, counts(tbe), strict=True):
            table.counts = Counter(dict(enumerate(frozen)))
    start = [weight.clone() for weight in tbe.split_embedding_weights()]
    for step in range(100):
        ids, offsets = batch(step, **{**batches, **({"length": 0} if step in (7, 70) else {})})
        weights = torch.rand(len(ids)) * 2 if weighted else None
        output = tbe(ids, offsets, weights)
        output.retain_grad()
        loss(output).backward()
        reference.step(ids, offsets, output.grad, weights, tbe.pooling_mode)
    for before, after in zip(start, tbe.split_embedding_weights(), strict=True):
        assert (after - before).abs().max() > 0.1, "the test trains nothing"
    reference.check(tbe)
