"""Configurations written as files and read back."""

from pathlib import Path

from orchestrator.config.document import Config, load_config

MINIMAL = "model:\n  path: demo\n"


def load(tmp_path: Path, text: str, *overrides: str, **environ: str) -> Config:
    """What is read from a file with that text. Raises InvalidConfig."""
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return load_config(file, overrides=overrides, environ=environ)
