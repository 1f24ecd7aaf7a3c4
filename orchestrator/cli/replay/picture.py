"""Draws the curves of a replay as a PNG, by matplotlib, which is installed for development and is optional here."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.replay.curves import Curve
from placement.errors import InvalidConfig

_FIELD = "--png"
_COLUMNS = 2
_LINEAR_MS = 1.0
_PANEL_INCHES = (6.0, 3.6)


def check_can_draw(path: Path) -> None:
    """Raises InvalidConfig where the picture could not be drawn or written, before anything is measured for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidConfig(
            field=_FIELD,
            value=str(path),
            problem="needs matplotlib, which is not installed",
            fix="Install it with `pip install matplotlib`, or leave --png out: --json has the figures.",
        )
    if path.suffix.lower() != ".png":
        raise InvalidConfig(field=_FIELD, value=str(path), problem="is no PNG", fix="Name a file that ends with .png.")
    if not path.parent.is_dir():
        raise _unwritable(path, "there is no such directory")


def draw(curves: Sequence[Curve], path: Path, *, title: str) -> None:
    """Writes the picture. Raises InvalidConfig where it cannot."""
    from matplotlib.figure import Figure

    num_rows = -(-len(curves) // _COLUMNS)
    figure = Figure(figsize=(_PANEL_INCHES[0] * _COLUMNS, _PANEL_INCHES[1] * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, _COLUMNS, squeeze=False)
    for panel, curve in zip(panels.flat, curves, strict=False):
        panel.step(curve.xs, curve.ys, where="post")
        panel.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label)
        if curve.xs and curve.x_label == "ms":
            # Tokens of one message have no time between them, and 0 has no logarithm.
            panel.set_xscale("log") if min(curve.xs) > 0 else panel.set_xscale("symlog", linthresh=_LINEAR_MS)
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise _unwritable(path, (error.strerror or str(error)).lower()) from None


def _unwritable(path: Path, why: str) -> InvalidConfig:
    fix = "Name a file in a directory that you may write to."
    return InvalidConfig(field=_FIELD, value=str(path), problem=f"cannot be written: {why}", fix=fix)
