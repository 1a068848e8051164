"""MovieLens-100K: fetched, read, and made batches for DLRM."""

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.common.packages import download
from benchmarks.common.samples import Samples, make, number

# RecBole ships MovieLens-100K inside its wheel, with a line of titles in each file.
WHEEL = "recbole==1.2.1"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"
WHEEL_FILES = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")

GENRES = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|"
    "Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")
AGE_GROUPS = (18, 25, 35, 45, 50, 56)  # MovieLens-1M's
LIKED = 4  # the label is 1 from this rating up
RARE = 0.2  # rare items: the least rated ones, which get about this share of the test ratings
SPLIT_SEED = 0  # the test ratings do not depend on a flag


@dataclass(frozen=True)
class MovieLens:
    """R ratings as click-through data: `labels` says whether a user liked an item."""

    tables: dict[str, int]  # sparse feature -> rows of its table; "genres" is the last
    ids: Tensor  # [R, features - 1] int64: the features of one id each, in the order of `tables`
    genres: Tensor  # [items, len(GENRES)] bool: the one feature that is a bag of several ids
    dense: Tensor  # [R, 3] float32: age, release year, time of rating; standardised on `train`
    labels: Tensor  # [R] float32
    train: Tensor  # row numbers of a random 80 / 10 / 10 split
    valid: Tensor
    test: Tensor
    rare_below: int  # a rare item has fewer train ratings than this
    rare: Tensor  # [R] bool: the ratings of rare items

    def batch(self, rows: Tensor) -> Batch:
        """These ratings as the input of `DLRMTrain`."""
        genres = self.genres[self.ids[rows, list(self.tables).index("item")]]
        ids = self.ids[rows].T
        return Batch(
            dense_features=self.dense[rows],
            sparse_features=KeyedJaggedTensor(
                keys=list(self.tables),
                values=torch.cat([ids.flatten(), genres.nonzero()[:, 1]]),
                lengths=torch.cat(
                    [torch.ones(ids.numel(), dtype=torch.int32), genres.sum(1).int()]
                ),
            ),
            labels=self.labels[rows],
        )


def fetch(folder: Path) -> None:
    download(WHEEL, [WHEEL_FOLDER + name for name in WHEEL_FILES], folder)


def read(folder: Path, limit: int | None = None) -> MovieLens:
    """Reads the files that `fetch` has put into a folder.

    Args:
        folder: holds the ratings, users and items.
        limit: use the first `limit` ratings only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or is no MovieLens file.
    """
    ratings_file, users_file, items_file = (folder / name for name in WHEEL_FILES)
    ratings = _lines(ratings_file, 4)[:limit]  # user, item, rating, time
    users = _lines(users_file, 5)  # id, age, gender, occupation, zip
    items = [
        [id_, year if year.isdigit() else "", *genres.split(" ")]
        for id_, _, year, genres in _lines(items_file, 4)
    ]
    if len(ratings) < 100:
        raise ValueError(f"{folder}: {len(ratings)} ratings are too few to split and to train on.")
    user_row = {user[0]: row for row, user in enumerate(users)}
    item_row = {item[0]: row for row, item in enumerate(items)}
    for column, known, file in ((0, user_row, users_file), (1, item_row, items_file)):
        if unknown := {rating[column] for rating in ratings} - known.keys():
            raise ValueError(
                f"{file} lacks id {min(unknown)}, which a rating names; is the file cut short?"
            )
    user = np.array([user_row[rating[0]] for rating in ratings])
    item = np.array([item_row[rating[1]] for rating in ratings])
    stars, seconds = np.array([rating[2:4] for rating in ratings], dtype=float).T
    age = np.array([user[1] for user in users], dtype=float)
    year = np.array([item[1] or "nan" for item in items], dtype=float)

    of_user = {
        "user": np.arange(len(users)),
        "age": np.digitize(age, AGE_GROUPS),
        "gender": _codes([user[2] for user in users]),
        "occupation": _codes([user[3] for user in users]),
        "zip": _codes([user[4][:3] for user in users]),
    }
    of_item = {"item": np.arange(len(items)), "year": _codes([item[1] for item in items])}
    when = [datetime.fromtimestamp(second, timezone.utc) for second in seconds]
    ids = {name: codes[user] for name, codes in of_user.items()}
    ids |= {name: codes[item] for name, codes in of_item.items()}
    ids |= {"hour": np.array([time.hour for time in when])}
    ids |= {"weekday": np.array([time.weekday() for time in when])}
    tables = {name: int(codes.max()) + 1 for name, codes in (of_user | of_item).items()}
    tables |= {"hour": 24, "weekday": 7, "genres": len(GENRES)}

    order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, valid, test = order.tensor_split([len(order) * 8 // 10, len(order) * 9 // 10])
    popularity = np.bincount(item[train], minlength=len(items))[item]  # train ratings of its item
    rare_below = int(np.quantile(popularity[test], RARE)) + 1
    dense = np.stack([age[user], year[item], seconds], axis=1)
    mean, std = np.nanmean(dense[train], axis=0), np.nanstd(dense[train], axis=0)
    return MovieLens(
        tables=tables,
        ids=torch.from_numpy(np.stack(list(ids.values()), axis=1)),
        genres=torch.tensor([[genre in item[2:] for genre in GENRES] for item in items]),
        # An unknown release year becomes the mean.
        dense=torch.from_numpy((dense - mean) / np.maximum(std, 1e-6)).nan_to_num().float(),
        labels=torch.from_numpy(stars >= LIKED).float(),
        train=train,
        valid=valid,
        test=test,
        rare_below=rare_below,
        rare=torch.from_numpy(popularity < rare_below),
    )


def samples(folder: Path) -> Samples:
    """MovieLens in the order of time. The genres of a movie are one id."""
    data = read(folder)
    order = data.dense[:, 2].argsort(stable=True)  # the time of the rating, which is no feature
    ids = data.ids[order]
    features = {
        name: number(ids[:, column].numpy())
        for column, name in enumerate(data.tables)
        if name != "genres"
    }
    of_item = torch.unique(data.genres, dim=0, return_inverse=True)[1]
    features["genres"] = number(of_item[ids[:, list(data.tables).index("item")]].numpy())
    return make(features, data.labels[order].numpy(), data.dense[order, :2].double().numpy())


def _lines(path: Path, fields: int) -> list[list[str]]:
    """The fields of a file's lines after its titles."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; the folder needs ratings, users and items.")
    with path.open(encoding="latin-1") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    for place, line in enumerate(lines, start=1):
        if len(line) != fields:
            raise ValueError(
                f"{path}, line {place}: expected {fields} fields, found {len(line)}; "
                "is the file cut short?"
            )
    return lines[1:]


def _codes(values: list[str]) -> np.ndarray:
    """Numbers the distinct values in order of appearance."""
    code = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([code[value] for value in values])
