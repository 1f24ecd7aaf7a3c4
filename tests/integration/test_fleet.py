"""deploy/fleet.yaml as one Ray job: shared prompts, their keys and values sent to workers that share every layer."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.netlab.fleet import Cluster, cluster, job, nodes, why_not_emulated, workers
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import REPOSITORY, Command
from tests.support.oracle import greedy_each

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MODEL = REPOSITORY / "deploy/demo"
MAX_TOKENS = 40
# Characters of the prompts: of less than a block, and of several steps.
LENGTHS = (20, 300, 2600)
DEMO_S = 500.0


@pytest.fixture(scope="module", params=["emulated", "plain"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The deployment in float32: on emulated hosts, and with all workers on this machine."""
    is_emulated = request.param == "emulated"
    if is_emulated and (reason := why_not_emulated()):
        pytest.skip(reason)
    with ExitStack() as stack:
        there = stack.enter_context(cluster(is_emulated=is_emulated))
        stack.enter_context(job(there, "model.dtype=float32"))
        yield there


def passage(first: int, length: int) -> list[int]:
    """Tokens of some characters of a text that the model does not know."""
    text = (MODEL / "heldout.txt").read_text()[first : first + length]
    token_ids: list[int] = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    return token_ids


def ask(there: Cluster, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of the service, asked at once by a client on the head."""
    argv = [sys.executable, str(REPOSITORY / "tests/support/deploying/ask_tokens.py"), there.address]
    done = subprocess.run(
        there.command(argv),
        input=json.dumps(wanted),
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_answers_are_those_of_transformers_and_prompts_were_computed_elsewhere(fleet: Cluster) -> None:
    asked = [passage(1000 * at, length) for at, length in enumerate(LENGTHS)]
    oracle = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    answers = ask(fleet, [{"prompt_ids": ids, "max_tokens": MAX_TOKENS} for ids in asked])
    assert [answer["token_ids"] for answer in answers] == greedy_each(oracle, asked, MAX_TOKENS)
    assert {answer["replica"] for answer in answers} == {"replica-1"}
    assert [answer["prefill_replica"] for answer in answers] == ["", "replica-0", "replica-0"]
    assert answers[-1]["num_sent_tokens"] >= len(asked[-1]) - 16, "all of it but what the prefix cache may have"


def test_status_shows_every_worker_where_the_file_puts_it(fleet: Cluster) -> None:
    said = fleet.ask("status").stdout
    found = re.findall(r"event=rank .*? node=(\S+) worker=(\S+) ", said)
    found += [(node, worker) for worker, node in re.findall(r"event=attention .*? worker=(\S+) node=(\S+) ", said)]
    assert [worker for _, worker in found] == [worker["name"] for worker in workers()]
    if fleet.hosts:
        assert [node for node, _ in found] == [worker["node"] for worker in workers()]
    assert len(re.findall(r"event=attention .* holds=\"KV heads .* of replica-1", said)) == 2, said
    assert re.findall(r"replica=(\S+) role=(\S+) state=READY", said) == [
        ("replica-0", "prefill"), ("replica-0", "prefill"), ("replica-1", "decode"), ("replica-1", "decode"),
    ]  # fmt: skip


def test_the_picture_of_a_request_has_a_lane_for_every_worker(fleet: Cluster, tmp_path: Path) -> None:
    picture = tmp_path / "request.svg"
    # A prompt that no prefix cache knows.
    ask(fleet, [{"prompt_ids": passage(9000, LENGTHS[2]), "max_tokens": MAX_TOKENS}])
    said = fleet.ask("timeline", str(tmp_path / "timeline.json"), "--svg", str(picture)).stdout
    assert str(picture) in said
    drawn = picture.read_text()
    assert all(f">{worker['name']} on " in drawn for worker in workers())
    assert "keys and values" in drawn and "rank 0, KV heads 3 of 4" in drawn


def test_make_fleet_demo_shows_it_all_and_leaves_nothing() -> None:
    with Command(["make", "fleet-demo", f"VENV={Path(sys.executable).parents[1]}"]) as demo:
        assert demo.process.wait(timeout=DEMO_S) == 0, demo.output()
        output = demo.output()
        assert not demo.family.alive()
    words = (
        "prompt computed on replica-0",
        "of it not hidden",
        "who did what for request",
        "event=attention ",
        "in 2 micro-batches",  # by which all-reduces, too, are on their way while something is computed
        "left: none",
    )
    for said in words:
        assert said in output, output
    where = f"{len(nodes())} emulated hosts" if why_not_emulated() is None else "run as processes of this machine"
    assert where in output, output
    assert (REPOSITORY / "build/fleet/request.svg").read_text().startswith("<svg ")
