"""Takes over what Ray prints at the driver: the lines of our actors, and its own words on nodes and processes.

Ray would print them with a prefix and colors of its own, and leave out what it takes for repetitions.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray._private import ray_constants
from ray._private import worker as ray_worker

# Takes a line, and who says it.
TakeLine = Callable[[str, str], None]

_SOURCES = {"Controller": "controller", "NodeAgent": "worker agent"}
_ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*m")
# By these Ray tells its own tools apart; they are not for people.
_MAGIC = re.compile(r"^:(actor_name|task_name|job_id):|__ray_tqdm_magic_token__")


def take_output(take: TakeLine) -> None:
    """Hands every line to ``take`` from the next connection on, instead of printing it."""
    # Looked up by that name when a driver connects, and for errors; there is no public way to do this.
    assert callable(ray_worker.print_to_stdstream)

    def hand_over(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        source = source_of(data)
        for line in lines_of(data):
            take(line, source)

    ray_worker.print_to_stdstream = hand_over
    # Ray's words in this process go where everything else is logged.
    logger = logging.getLogger("ray")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def source_of(data: Mapping[str, Any]) -> str:
    """Returns who printed the lines of ``data``, which is how Ray hands them to a driver."""
    return _SOURCES.get(str(data.get("actor_name", "")), "ray")


def lines_of(data: Mapping[str, Any]) -> Iterable[str]:
    """Yields the lines of ``data`` as they were printed, without what is for Ray's own tools."""
    lines: Iterable[str] = data.get("lines", ())
    if data.get("pid") == "autoscaler":
        lines = ray_worker.filter_autoscaler_events(list(lines))
    for line in lines:
        if not _MAGIC.search(line):
            yield _ESCAPE_CODES.sub("", line.split(ray_constants.LOG_PREFIX_INFO_MESSAGE)[-1])
