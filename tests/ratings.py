"""A few hundred ratings in the three layouts of MovieLens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.common.movielens import AGE_GROUPS, GENRES

RATINGS, USERS, ITEMS = 400, 30, 50

# MovieLens as its three layouts share it; every item has two genres.
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
    write(folder / "ml-100k.inter", "\t", [["user_id:token", "", "", ""], *ratings])
    write(folder / "ml-100k.user", "\t", [["user_id:token", "", "", "", ""], *rows])
    write(folder / "ml-100k.item", "\t", [["item_id:token", "", "", ""], *lines])


def write_100k(folder: Path) -> None:
    write(folder / "u.data", "\t", ratings)
    write(folder / "u.user", "|", [(*user[:3], f"job {user[3]}", user[4]) for user in users])
    lines = [
        (id_, titled(title, year), "01-Jan-1995", "", "", *(int(g in genres) for g in GENRES))
        for id_, title, year, genres in items
    ]
    write(folder / "u.item", "|", lines)


def write_1m(folder: Path) -> None:
    write(folder / "ratings.dat", "::", ratings)
    rows = [(id_, gender, age, job, zip_) for id_, age, gender, job, zip_ in users]
    write(folder / "users.dat", "::", rows)
    lines = [(id_, titled(title, year), "|".join(genres)) for id_, title, year, genres in items]
    write(folder / "movies.dat", "::", lines)


def titled(title: str, year: str) -> str:
    return f"{title} ({year})" if year else title


def write(path: Path, separator: str, lines: Any) -> None:
    text = "".join(separator.join(map(str, line)) + "\n" for line in lines)
    path.write_text(text, encoding="latin-1")
