"""The results file: one JSON line a run."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.study.config import Run

Result = dict[str, Any]
KEY = tuple(field.name for field in fields(Run))


class Results:
    """What is known so far. A run that has its line is not run again.

    Args:
        path: the file; made with the first result. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[tuple[Any, ...], Result] = {}
        if path.exists():
            *whole, rest = path.read_text().split("\n")
            for line in whole:
                result = json.loads(line)
                self._results[tuple(result[name] for name in KEY)] = result
            if rest:
                path.write_text("".join(line + "\n" for line in whole))

    def get(self, run: Run) -> Result | None:
        return self._results.get(tuple(run.key().values()))

    def add(self, run: Run, result: Result) -> None:
        self._results[tuple(run.key().values())] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
