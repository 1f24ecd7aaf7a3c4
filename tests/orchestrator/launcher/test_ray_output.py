"""What Ray would print at the driver comes to us."""

import inspect
import logging
from typing import Any

import pytest
from ray._private import worker as ray_worker

from orchestrator.launcher.ray_output import lines_of, source_of, take_output


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ({"actor_name": "Controller", "pid": 5}, "controller"),
        ({"actor_name": "NodeAgent", "pid": 5}, "worker agent"),
        ({"pid": "raylet"}, "ray"),
        ({"task_name": "f", "pid": 5}, "ray"),
    ],
)
def test_every_line_has_somebody_who_says_it(data: dict[str, Any], source: str) -> None:
    assert source_of(data) == source


def test_lines_lose_colors_and_what_is_for_tools() -> None:
    data = {
        "pid": 5,
        "lines": [":actor_name:NodeAgent", "\x1b[33mhello\x1b[0m", '{"__ray_tqdm_magic_token__": 1}', "a"],
    }
    assert list(lines_of(data)) == ["hello", "a"]


def test_ray_still_prints_through_the_function_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    printing = ray_worker.print_to_stdstream
    assert list(inspect.signature(printing).parameters) == ["data", "ignore_prefix"]
    for caller in (ray_worker.connect, ray_worker.listen_error_messages):
        assert "print_to_stdstream" in inspect.getsource(inspect.unwrap(caller))
    monkeypatch.setattr(ray_worker, "print_to_stdstream", printing)
    logger = logging.getLogger("ray")
    handlers, propagate = list(logger.handlers), logger.propagate
    taken: list[tuple[str, str]] = []
    try:
        take_output(lambda line, source: taken.append((line, source)))
        assert logger.propagate and not logger.handlers
        ray_worker.print_to_stdstream({"pid": "raylet", "is_err": True, "lines": ["a node died"]}, ignore_prefix=False)
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    assert taken == [("a node died", "ray")]
