"""Every command of the README runs as it is written.

``serve`` and what talks to it: test_serve, by the functions here. ``ray job submit`` and its cluster: test_ray_job. The
section on two machines: test_two_machines.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import REPOSITORY, Command, free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

README = (REPOSITORY / "README.md").read_text()
SERVE = "heterodyne serve deploy/local.yaml"
SERVE_ATTENTION = "heterodyne serve deploy/attention-offload.yaml"
ELSEWHERE = {
    "make test",  # is what runs this test
    "source .venv/bin/activate",  # below, in front of every command
    "make fleet-demo",  # test_fleet
    SERVE_ATTENTION,  # test_attention_offload, at an address of its own
    "ray start --head",  # test_ray_job, with ports of its own
    f"ray job submit --address http://127.0.0.1:8265 --working-dir . -- {SERVE}",  # likewise
}
# So that the tests neither need nor disturb the default ports.
ADDRESS, HTTP, METRICS = (f"127.0.0.1:{free_port()}" for _ in range(3))
ENV = {
    "HETERODYNE_GATEWAY__ADDRESS": ADDRESS,
    "HETERODYNE_GATEWAY__HTTP_ADDRESS": HTTP,
    "HETERODYNE_ADDRESS": ADDRESS,
    "HETERODYNE_TELEMETRY__PROMETHEUS_ADDRESS": METRICS,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def shell(command: str) -> list[str]:
    activate = f"source {shlex.quote(str(Path(sys.executable).parent / 'activate'))}"
    return ["bash", "-c", f"{activate} && exec {command}"]


def test_make_demo_streams_an_answer_and_leaves_nothing() -> None:
    assert "make demo" in commands()
    # The environment is there already: the tests run in it.
    with Command(["make", "demo", f"VENV={Path(sys.executable).parents[1]}"], env=ENV) as demo:
        assert demo.process.wait(timeout=180.0) == 0, demo.output()
        output = demo.output()
        assert not demo.family.alive()
    for words in (
        "time to first token",
        "time per output token",
        "tokens/s",
        "prompt computed",
        "on replica-0; the answer on replica-1",
        "replica=replica-0 role=prefill state=READY",
        "none left",
    ):
        assert words in output


def serve_as_written(**more: str) -> Command:
    """The README's service, at ``ADDRESS`` and with further settings; it serves when this returns."""
    assert SERVE in commands()
    service = Command(shell(SERVE), env=ENV | more)
    try:
        service.wait_for(f"event=serving model=demo address={ADDRESS}")
    except BaseException:
        service.close()
        raise
    return service


def elsewhere(text: str) -> str:
    """Returns what is written in the README with the ports of the tests, where the environment does not say them."""
    for port, address in (("50051", ADDRESS), ("8000", HTTP), ("9464", METRICS)):
        text = text.replace(f"127.0.0.1:{port}", address)
    return text


def run_every_command_that_talks_to_it() -> None:
    """To the service of :func:`serve_as_written`, while that runs."""
    rest = [elsewhere(command) for command in commands() if command not in {*ELSEWHERE, "make demo", SERVE}]
    assert len(rest) == 18
    for command in rest:
        result = subprocess.run(
            shell(command),
            env=os.environ | ENV,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        assert result.stdout.strip(), command


def run_python_examples() -> None:
    """Against the same service."""
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        result = subprocess.run(
            [sys.executable, "-c", elsewhere(example)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=True,
        )
        assert len(result.stdout) > 20


def test_the_yaml_shown_is_that_of_the_files() -> None:
    shown = [yaml.safe_load(block) for block in blocks("yaml")]
    names = ("local.yaml", "two-machines.yaml", "split.yaml", "disaggregated.yaml", "attention-offload.yaml")
    assert shown == [yaml.safe_load((REPOSITORY / "deploy" / name).read_text()) for name in names]


def test_what_a_link_or_a_picture_points_to_is_there() -> None:
    files = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "tests/benchmarks/README.md")]
    for file in files:
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text())
        missing = [target for target in targets if not (file.parent / target).exists()]
        assert not missing, (file, missing)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in commands()
    assert re.search(r"^exec make test$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
