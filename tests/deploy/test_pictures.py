"""The pictures in deploy/pictures are what the code draws now."""

from functools import partial
from pathlib import Path

from orchestrator.cli.plan_picture import plan_svg
from orchestrator.config.document import load_config
from orchestrator.deployment.plan_lines import place_of
from orchestrator.deployment.preflight import preflight
from tests.support.deploying.deployment import MACHINE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_picture_of_a_split_is_current() -> None:
    checked = preflight(load_config(DEPLOY / "split.yaml", environ={}), machine=MACHINE, listens=False)
    drawn = plan_svg(checked.plan, partial(place_of, checked))
    assert (DEPLOY / "pictures" / "split.svg").read_text() == drawn, "run: make pictures"
