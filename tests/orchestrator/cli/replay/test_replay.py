"""The command ``replay``, against services that run: what it prints, draws and refuses."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.cli.app import app
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import deploy, make_config
from tests.support.gateway.generating import serving, told

REPOSITORY = Path(__file__).resolve().parents[4]
TRACES = REPOSITORY / "deploy" / "traces"
AZURE, MOONCAKE = TRACES / "azure-conversation.csv", TRACES / "mooncake-synthetic.jsonl"
PNG = b"\x89PNG\r\n\x1a\n"


async def run(*args: object) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["replay", *map(str, args)])


def pairs(output: str, event: str) -> list[dict[str, str]]:
    """The lines of an event, by key."""
    found = [line for line in output.splitlines() if line.startswith(f"event={event} ")]
    return [dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line)) for line in found]


async def test_a_trace_is_replayed_by_a_service(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, cluster={"ray_address": "local"})
    picture = tmp_path / "curves.png"
    async with deploy(config) as running:
        where = ("--address", running.address)
        mooncake = await run(
            MOONCAKE, "--rate", 200, "--scale", 0.02, "--duration", 20, "--json", "--slo-ttft", 60, "--slo", *where
        )
        azure = await run(
            AZURE, "--rate", 100, "--scale", 0.05, "--limit", 8, "--slo-tbt", 1e-6, "--png", picture, *where
        )
        refused = await run(AZURE, "--vocab-size", 10_000, *where)
    check_mooncake(mooncake)
    assert azure.exit_code == 0, azure.output
    (whole,) = pairs(azure.stdout, "replay")
    assert (whole["planned"], whole["completed"], whole["failed"]) == ("8", "8", "0")
    latencies = pairs(azure.stdout, "latency")
    assert [line["metric"] for line in latencies] == ["ttft", "tbt", "tpot", "e2e", "lateness"]
    assert all(float(line["p50_s"]) <= float(line["p90_s"]) <= float(line["p99_s"]) for line in latencies)
    (prefix,) = pairs(azure.stdout, "prefix")
    assert prefix["cached_tokens"] == "0", "prompts of a trace without blocks share nothing"
    (goodput,) = pairs(azure.stdout, "goodput")
    assert int(goodput["num_kept"]) < 8
    assert picture.read_bytes().startswith(PNG) and f"drawn in {picture}" in azure.stderr
    assert refused.exit_code == 1 and "--vocab-size: is more than the model's 509 token ids" in refused.stderr


def check_mooncake(result: Result) -> None:
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    told = json.loads(result.stdout)
    requests = told["requests"]
    assert requests["completed"] == requests["planned"] == 60 and requests["failed"] == 0 and not told["errors"]
    assert requests["clipped"] > 0, "the model's context is 512 tokens"
    assert 0 < told["prefix"]["hit_rate"] <= told["prefix"]["shared_in_trace"]
    assert told["ttft_s"]["count"] == told["e2e_s"]["count"] == 60
    assert 0 < told["ttft_s"]["p50"] <= told["ttft_s"]["p99"] <= told["ttft_s"]["max"] <= told["e2e_s"]["max"]
    assert told["goodput"]["share"] == 1.0 and told["goodput"]["num_kept"] == 60
    assert [(item["metric"], item["percent"]) for item in told["slowdowns"]] == [
        (metric, percent) for metric in ("ttft", "tbt", "e2e") for percent in (50, 90, 99)
    ]
    assert told["settings"]["rate"] == 200.0 and told["interrupted"] is False


async def replaying(*args: object) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "orchestrator", "replay", *map(str, args)]
    return await asyncio.create_subprocess_exec(
        *command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def test_ctrl_c_ends_it_with_a_report() -> None:
    async with serving() as (gateway, _):
        command = await replaying(AZURE, "--scale", 0.01, "--json", "--address", gateway.address)
        try:
            await told(gateway.worker)
            command.send_signal(signal.SIGINT)
            output, errors = await asyncio.wait_for(command.communicate(), PATIENCE_S)
        finally:
            if command.returncode is None:
                command.kill()
                await command.wait()
    assert command.returncode == 0, errors.decode()
    report = json.loads(output)
    assert report["interrupted"] is True and report["requests"]["planned"] == 20
    assert report["requests"]["stopped"] >= 1 and report["ttft_s"] is None


def trace_file(directory: Path, lines: Sequence[str]) -> Path:
    path = directory / "trace.csv"
    path.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *lines)))
    return path


async def test_where_no_request_is_answered_the_report_says_why_and_the_command_fails(tmp_path: Path) -> None:
    path = trace_file(tmp_path, ["2023-11-16 18:15:46,3,2"])
    async with serving() as (gateway, _):
        result = await run(path, "--timeout", 0.2, "--address", gateway.address)
    assert result.exit_code == 1
    (error,) = pairs(result.stdout, "errors")
    assert (error["code"], error["count"]) == ("DEADLINE_EXCEEDED", "1")


async def test_mistakes_are_one_line_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = trace_file(tmp_path, ["2023-11-16 18:15:46,3,2", "2023-11-16 18:15:47,three,2"])
    nowhere = ("--address", "127.0.0.1:1")

    async def error(*args: object) -> str:
        result = await run(*args, *nowhere)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        return result.stderr

    assert f"error: {bad}, line 3, ContextTokens: is no number of tokens (got 'three')" in await error(bad)
    assert "nothing listens at 127.0.0.1:1" in await error(AZURE)
    assert "is no PNG" in await error(AZURE, "--png", tmp_path / "curves.svg")
    assert "there is no such directory" in await error(AZURE, "--png", tmp_path / "none" / "curves.png")
    monkeypatch.setattr("orchestrator.cli.replay.picture.importlib.util.find_spec", lambda name: None)
    assert "needs matplotlib" in await error(AZURE, "--png", tmp_path / "curves.png")


@pytest.mark.parametrize("option", ["--rate", "--scale", "--duration", "--slo-ttft", "--slo-tbt", "--timeout"])
@pytest.mark.parametrize("value", ["nan", "inf", "0"])
async def test_numbers_that_are_none_are_refused_by_name(option: str, value: str) -> None:
    result = await run(AZURE, option, value, "--address", "127.0.0.1:1")
    assert result.exit_code == 2 and option in result.stderr
