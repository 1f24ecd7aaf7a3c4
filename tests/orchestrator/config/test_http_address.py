"""Where HTTP is served: nowhere unless it is asked for, and on a port of its own."""

from pathlib import Path

import pytest

from orchestrator.config.types import Address
from placement.errors import InvalidConfig
from tests.support.deploying.configs import MINIMAL, load


def test_there_is_no_http_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).gateway.http_address is None
    config = load(tmp_path, MINIMAL, "gateway.http_address=127.0.0.1:0", "gateway.address=127.0.0.1:0")
    assert config.gateway.http_address == Address("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("text", "port_of"),
    [
        ("gateway: {http_address: '0.0.0.0:50051'}\n", "gateway.address"),
        (
            "gateway: {http_address: '0.0.0.0:9464'}\ntelemetry: {prometheus_address: '0.0.0.0:9464'}\n",
            "telemetry.prometheus_address",
        ),
    ],
)
def test_a_port_that_is_taken_by_another_surface_is_refused(tmp_path: Path, text: str, port_of: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, MINIMAL + text)
    assert caught.value.field == "gateway.http_address"
    assert caught.value.problem == f"has the port of {port_of}, on line 3 in cluster.yaml"
