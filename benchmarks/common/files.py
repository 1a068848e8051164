"""Optimizers side by side on your own data: a Parquet or CSV file with a label of 0 or 1.

Every column that is not the label, the time or dense is a feature with one id a sample. Ids are
numbered as they come; after the first million of a column, new ones are hashed into as many rows.
Dense columns become sign(x) log(1 + |x|), standardised; a missing number is the mean. With --time
the samples are a stream in its order, else in a random one: four fifths train, each batch is
predicted before, and the last fifth judges what has been learned. The file is read in parts, and
its numbered samples are kept in --out, 4 bytes an id.
"""

import contextlib
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap
from pyarrow import csv
from tqdm import tqdm

from benchmarks.common.samples import Array, seal

MOST_ROWS: Final = 1_000_000  # of a table
PART: Final = 200_000  # samples read at once
ORDER_SEED: Final = 0


def prepare(file: Path, label: str, time: str | None, dense: Sequence[str], folder: Path) -> Path:
    """The folder with the samples of a file, which it makes if it does not exist.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column or a label is not what it should be, or the folder holds the samples of
            another file or of other columns.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file.")
    stat = file.stat()
    about = {"file": file.name, "bytes": stat.st_size, "changed": stat.st_mtime_ns}
    about |= {"label": label, "time": time, "dense": list(dense)}
    if folder.exists():
        known = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["about"]
        if known != about:
            other = [name for name, value in about.items() if known.get(name) != value]
            raise ValueError(
                f"{folder} holds other samples ({', '.join(other)} differ): name another folder "
                "with --out, or delete it."
            )
        return folder
    names = _columns(file)
    for name in (label, *([time] if time else []), *dense):
        if name not in names:
            raise ValueError(f"{file} has no column {name!r}; it has {', '.join(names)}.")
    if len({label, time, *dense}) < 2 + len(dense):
        raise ValueError(f"A column is named twice: label {label}, time {time}, dense {dense}.")
    features = [name for name in names if name not in (label, time, *dense)]
    if not features:
        raise ValueError(f"{file} has no column left for ids: all are label, time or dense.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        tables = _write(file, label, time, dense, features, made)
        seal(made, tables, about)
        made.rename(folder)
    return folder


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() in (".csv", ".tsv", ".txt", ".gz")


def _columns(file: Path) -> list[str]:
    try:
        if _is_csv(file):
            with _open_csv(file, {}) as reader:
                return list(reader.schema.names)
        return list(pq.ParquetFile(file).schema_arrow.names)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file, and no CSV: {_first_line(error)}") from error


def _open_csv(file: Path, types: dict[str, Any]) -> Any:
    tabs = csv.ParseOptions(delimiter="\t" if ".tsv" in file.suffixes else ",")
    return csv.open_csv(
        file, parse_options=tabs, convert_options=csv.ConvertOptions(column_types=types)
    )


def _parts(file: Path, features: Sequence[str], dense: Sequence[str]) -> Iterator[Any]:
    """Record batches of the file, in its order; the ids of a CSV file are text."""
    if not _is_csv(file):
        yield from pq.ParquetFile(file).iter_batches(batch_size=PART)
        return
    types = dict.fromkeys(features, pa.string()) | dict.fromkeys(dense, pa.float64())
    with _open_csv(file, types) as reader:
        yield from reader


def _write(
    file: Path,
    label: str,
    time: str | None,
    dense: Sequence[str],
    features: Sequence[str],
    folder: Path,
) -> dict[str, int]:
    """Writes the arrays of `Samples`; returns the rows of each feature's table."""
    numbers: dict[str, dict[str, int]] = {name: {} for name in features}
    shapes = {"ids": (np.int32, len(features)), "dense": (np.float32, max(1, len(dense)))}
    times: list[Array] = []
    labels: list[Array] = []
    with contextlib.ExitStack() as stack:
        raw = {name: stack.enter_context((folder / f"{name}.raw").open("wb")) for name in shapes}
        try:
            for part in tqdm(
                _parts(file, features, dense), desc=f"reading {file.name}", unit="part"
            ):
                labels.append(_labels(part.column(label), label))
                if time:
                    times.append(_times(part.column(time), time))
                ids = [_number(part.column(name), name, numbers[name]) for name in features]
                raw["ids"].write(np.stack(ids, axis=1).astype(np.int32).tobytes())
                columns = [_dense(part.column(name), name) for name in dense]
                values = np.stack(columns or [np.ones(len(part))], axis=1)
                raw["dense"].write(values.astype(np.float32).tobytes())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: {_first_line(error)}") from error
    count = sum(map(len, labels))
    if not count:
        raise ValueError(f"{file} holds no samples.")
    np.save(folder / "labels.npy", np.concatenate(labels))
    random = np.random.default_rng(ORDER_SEED)
    order = np.concatenate(times).argsort(kind="stable") if time else random.permutation(count)
    np.save(folder / "order.npy", order)
    for name, (dtype, width) in shapes.items():
        source = np.memmap(folder / f"{name}.raw", dtype, "r", shape=(count, width))
        target = open_memmap(folder / f"{name}.npy", "w+", dtype, (count, width))
        mean, scale = _scale(source) if name == "dense" and dense else (0, 1)
        for start in range(0, count, PART):
            part = source[start : start + PART]
            target[start : start + PART] = (
                np.nan_to_num((part - mean) / scale) if name == "dense" else part
            )
        del source, target
        (folder / f"{name}.raw").unlink()
    return {name: len(known) for name, known in numbers.items()}


def _labels(column: Any, name: str) -> Array:
    values = _numbers(column, f"The label {name}")
    wrong = ~np.isin(values, (0, 1))
    if wrong.any():
        found = values[wrong][0]
        text = "is missing in a sample" if np.isnan(found) else f"has the value {found:g}"
        raise ValueError(f"The label {name} {text}. It must be 0 or 1.")
    return values.astype(np.uint8)


def _times(column: Any, name: str) -> Array:
    """Numbers whose order is that of the column: of dates, times or numbers."""
    if column.null_count:
        raise ValueError(f"The time {name} is missing in {column.null_count} samples.")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column = column.cast(pa.timestamp("us"))
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"The time {name} is text, and no date: {_first_line(error)}"
            ) from error
    if pa.types.is_temporal(column.type):
        wide = column.cast(pa.timestamp("us")) if pa.types.is_date(column.type) else column
        values: Array = wide.cast(pa.int64()).to_numpy(zero_copy_only=False)
        return values
    return _numbers(column, f"The time {name}")


def _dense(column: Any, name: str) -> Array:
    values = _numbers(column, f"The dense column {name}")
    values[~np.isfinite(values)] = np.nan
    logs: Array = np.sign(values) * np.log1p(np.abs(values))
    return logs


def _numbers(column: Any, what: str) -> Array:
    """float64 [N], NaN where a value is missing."""
    try:
        wide = (
            column.cast(pa.float64())
            if not pa.types.is_boolean(column.type)
            else (column.cast(pa.uint8()).cast(pa.float64()))
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{what} is of type {column.type}, and no number.") from error
    values: Array = np.array(wide.to_numpy(zero_copy_only=False), dtype=np.float64)
    return values


def _number(column: Any, name: str, known: dict[str, int]) -> Array:
    """int64 [N] numbers of the ids; ``known`` takes up new ones. A missing id is one of its own."""
    try:
        texts = pc.fill_null(column.cast(pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"The column {name} is of type {column.type}: ids must be one number or text a sample. "
            "Leave it out of the file."
        ) from error
    encoded = pc.dictionary_encode(texts)
    rows = np.empty(len(encoded.dictionary), dtype=np.int64)
    for place, value in enumerate(encoded.dictionary.to_pylist()):
        row = known.get(value)
        if row is None:
            full = len(known) >= MOST_ROWS
            row = zlib.crc32(value.encode()) % MOST_ROWS if full else len(known)
            if not full:
                known[value] = row
        rows[place] = row
    found: Array = rows[encoded.indices.to_numpy(zero_copy_only=False)]
    return found


def _scale(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each column, of what is not missing."""
    sums = np.zeros((3, values.shape[1]))
    for start in range(0, len(values), PART):
        part = values[start : start + PART].astype(np.float64)
        found = np.isfinite(part)
        part = np.where(found, part, 0)
        sums += np.stack([found.sum(0), part.sum(0), np.square(part).sum(0)])
    count = np.maximum(sums[0], 1)
    mean = sums[1] / count
    return mean, np.sqrt(np.maximum(sums[2] / count - mean**2, 1e-12))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
