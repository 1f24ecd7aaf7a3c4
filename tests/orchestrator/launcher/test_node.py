"""What a node says of itself."""

from pathlib import Path

import psutil
import pytest

from orchestrator.launcher import node
from orchestrator.launcher.node import advertised_host, available_memory_bytes, has_gpu, host_port


@pytest.mark.parametrize(
    ("bind_host", "expected"),
    [
        ("0.0.0.0", "10.0.0.7"),
        ("::", "10.0.0.7"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("head.example", "head.example"),
    ],
)
def test_a_wildcard_is_reached_at_the_nodes_own_address(bind_host: str, expected: str) -> None:
    assert advertised_host(bind_host, "10.0.0.7") == expected


def test_ipv6_addresses_are_bracketed() -> None:
    assert (host_port("::1", 0), host_port("127.0.0.1", 80)) == ("[::1]:0", "127.0.0.1:80")


def test_memory_is_what_the_container_leaves_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "container_available", lambda read: 1234)
    assert available_memory_bytes() == 1234
    monkeypatch.setattr(node, "container_available", lambda read: 2**62)
    assert 1234 < available_memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize("name", ["nvidia0", "nvidia12", "dxg", "nvhost-gpu"])
def test_a_gpu_is_known_by_its_drivers_device(name: str, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "null").touch()
    assert not has_gpu(tmp_path)
    (tmp_path / name).touch()
    assert has_gpu(tmp_path)
