"""``serve`` warns of a Ray that lets in anybody."""

import io

import pytest
from rich.console import Console

from orchestrator.deployment import serve
from orchestrator.event_log import EventLog


@pytest.mark.parametrize("open_to_all", [True, False])
def test_a_joined_ray_without_authentication_is_warned_of(open_to_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "lets_in_anybody", lambda: open_to_all)
    out = io.StringIO()
    serve._warn_of_strangers("10.0.0.1:6379", EventLog(Console(file=out)))
    said = out.getvalue().splitlines()
    assert len(said) == int(open_to_all)
    for line in said:
        assert "level=warning event=ray_without_authentication ray_address=10.0.0.1:6379 " in line
        assert "RAY_AUTH_MODE=token" in line
