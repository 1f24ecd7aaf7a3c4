"""The command line before it reaches a service."""

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app


@pytest.mark.parametrize(
    "option",
    ["--seed=-1", f"--seed={2**64}", "--max-tokens=3000000000", "--max-tokens=0", "--top-k=-1", "--temperature=-1"],
)
def test_values_that_the_protocol_cannot_hold_are_refused_by_name(option: str) -> None:
    result = CliRunner().invoke(app, ["generate", "hello", option, "--address", "127.0.0.1:1", "--timeout", "1"])
    assert result.exit_code == 2, result.output
    assert option.partition("=")[0] in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
