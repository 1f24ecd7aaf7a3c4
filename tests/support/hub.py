"""A repository in the cache of Hugging Face, as ``hf download`` leaves it."""

import os
import shutil
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_snapshot(model: Path, *, name: str = "models--some--model", absolute: bool = False) -> Path:
    """Copies the files of a model directory to the blobs of a repository beside it; returns the snapshot with links."""
    repository = model.parent / f"{model.name}-cache" / name
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(model.iterdir())):
        blob = blobs / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob if absolute else os.path.relpath(blob, snapshot))
    return snapshot
