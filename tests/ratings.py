"""A few hundred ratings, written as MovieLens-100K is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.common.movielens import AGE_GROUPS, GENRES

RATINGS, USERS, ITEMS = 400, 30, 50

# Every item has two genres.
_random = random.Random(0)
users = [
    (str(id_), str(_random.choice((1, *AGE_GROUPS))), _random.choice("MF"), id_ % 5, f"{id_}2345")
    for id_ in range(1, USERS + 1)
]
items = [
    # One item has no release year, as in the published files.
    (str(id_), f"Amélie {id_}", "" if id_ == 7 else str(1970 + id_), _random.sample(GENRES, 2))
    for id_ in range(1, ITEMS + 1)
]
ratings = [
    [str(_random.randint(1, most)) for most in (USERS, ITEMS, 5)] + [str(880_000_000 + 3571 * n)]
    for n in range(RATINGS)
]


def write_recbole(folder: Path) -> None:
    occupations = ["artist", "doctor", "educator", "lawyer", "writer"]
    rows = [(id_, age, gender, occupations[job], zip_) for id_, age, gender, job, zip_ in users]
    lines = [
        (id_, title, year or "unkonwn", " ".join(genres)) for id_, title, year, genres in items
    ]
    write(folder / "ml-100k.inter", [["user_id:token", "", "", ""], *ratings])
    write(folder / "ml-100k.user", [["user_id:token", "", "", "", ""], *rows])
    write(folder / "ml-100k.item", [["item_id:token", "", "", ""], *lines])


def write(path: Path, lines: Any) -> None:
    text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
    path.write_text(text, encoding="latin-1")
