"""The command line: what it refuses by itself, what it asks of a service, and what it shows of the answer."""

import json
import logging
import sys
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import grpc
import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.errors import LaunchFailed
from orchestrator.event_log import EventLog
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc


@dataclass
class Service(inference_pb2_grpc.InferenceServicer):
    """Keeps what it is asked and answers with its echo, where asked for, and two tokens in each choice."""

    asked: list[pb.GenerateRequest] = field(default_factory=list)
    address: str = ""

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        yield pb.GenerateResponse(accepted=pb.Accepted(prompt_tokens=2))
        if request.echo:
            judged = pb.Token(id=8, logprob=-0.5, top=[pb.TokenLogprob(token_id=9, logprob=-0.25)])
            yield pb.GenerateResponse(echo=pb.Echo(tokens=[pb.Token(id=7), judged], text="once "))
        num_tokens = 0 if request.HasField("max_tokens") and request.max_tokens == 0 else 2
        num_choices = max(1, request.num_choices)
        for choice in range(num_choices):
            end = pb.ChoiceEnd(finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=num_tokens)
            tokens = [pb.Token(id=index, logprob=-1.0) for index in range(num_tokens)]
            text = f"upon {choice}" if num_tokens else ""
            yield pb.GenerateResponse(chunk=pb.Chunk(tokens=tokens, text=text, choice=choice, end=end))
        usage = pb.Usage(prompt_tokens=2, completion_tokens=num_tokens * num_choices, cached_prompt_tokens=1)
        timings = pb.Timings(time_to_first_token_s=0.25) if num_tokens else pb.Timings()
        reason = pb.FINISH_REASON_LENGTH
        yield pb.GenerateResponse(
            finished=pb.Finished(finish_reason=reason, usage=usage, timings=timings, replica="replica-0")
        )


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None).wait()


@pytest.fixture
def service(running: Service) -> Service:
    running.asked.clear()
    return running


def generate(service: Service, *args: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["generate", *args, "--address", service.address], input=stdin)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("--seed", ["--seed=-1"]),
        ("--seed", [f"--seed={2**64}"]),
        ("--max-tokens", ["--max-tokens=3000000000"]),
        ("--max-tokens", ["--max-tokens=0"]),
        ("--max-tokens", ["--max-tokens=-1", "--echo"]),
        ("--top-k", ["--top-k=-1"]),
        ("--temperature", ["--temperature=-1"]),
        ("--min-p", ["--min-p=1.5"]),
        ("--presence-penalty", ["--presence-penalty=3"]),
        ("--frequency-penalty", ["--frequency-penalty=-3"]),
        ("--repetition-penalty", ["--repetition-penalty=-1"]),
        ("--n", ["--n=65"]),
        ("--n", ["--n=0"]),
        ("--min-tokens", ["--min-tokens=-1"]),
        ("--logprobs", ["--logprobs=21"]),
        ("--logit-bias", ["--logit-bias=5"]),
        ("--logit-bias", ["--logit-bias=5=much"]),
        ("--logit-bias", ["--logit-bias=-5=1"]),
        ("--system", ["--system=be kind"]),
        ("--json-schema", ["--json-schema=/no/such/schema.json"]),
        ("--grammar", ["--grammar=missing.lark"]),
        ("--regex", ["--regex=a", "--json-schema={}"]),
    ],
)
def test_values_that_the_protocol_cannot_hold_are_refused_by_name(named: str, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["generate", "hello", *options, "--address", "127.0.0.1:1", "--timeout", "1"])
    assert result.exit_code == 2, result.output
    assert named in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_plain_prompt_asks_for_nothing_else_and_streams(service: Service) -> None:
    result = generate(service, "-", stdin="once")
    assert service.asked == [pb.GenerateRequest(prompt="once", num_choices=1, sampling=pb.SamplingParams())]
    assert result.stdout == "upon 0\n"
    assert "2 prompt tokens (1 cached), 2 generated on replica-0; ended by its length" in result.stderr
    assert "time to first token 250.0 ms" in result.stderr


def test_standard_input_that_is_no_text_is_refused_in_a_line() -> None:
    result = CliRunner().invoke(app, ["generate", "-", "--address", "127.0.0.1:1"], input=b"ab\xff")
    assert result.exit_code == 2 and "not UTF-8" in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_every_option_reaches_the_service(service: Service) -> None:
    options = (
        "--max-tokens=9 --min-tokens=2 --n=3 --temperature=0.5 --top-k=4 --top-p=0.75 --min-p=0.25 --seed=6 "
        "--repetition-penalty=1.5 --presence-penalty=-0.5 --frequency-penalty=0.5 --logit-bias=4=-2 --logit-bias=5=1.5 "
        "--stop=x --stop=y --regex=a+ --echo --logprobs=2 --cache-salt=tenant"
    )
    generate(service, "once", *options.split())
    assert service.asked == [
        pb.GenerateRequest(
            prompt="once",
            max_tokens=9,
            min_tokens=2,
            num_choices=3,
            sampling=pb.SamplingParams(
                temperature=0.5,
                top_k=4,
                top_p=0.75,
                min_p=0.25,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=0.5,
                seed=6,
                logit_bias=[pb.LogitBias(token_id=4, bias=-2), pb.LogitBias(token_id=5, bias=1.5)],
            ),
            stop=["x", "y"],
            structured_output=pb.StructuredOutput(regex="a+"),
            echo=True,
            logprobs=2,
            cache_salt="tenant",
        )
    ]


def test_a_chat_is_what_a_user_says_after_what_the_system_says(service: Service) -> None:
    generate(service, "hi", "--chat", "--system", "be kind")
    generate(service, "hi", "--chat")
    said = [[(message.role, message.content) for message in asked.chat.messages] for asked in service.asked]
    assert said == [[("system", "be kind"), ("user", "hi")], [("user", "hi")]]


@pytest.mark.parametrize("option", ["json-schema", "grammar"])
def test_what_the_answer_must_match_comes_from_a_file_or_is_the_text(
    service: Service, tmp_path: Path, option: str
) -> None:
    text = json.dumps({"type": "object", "title": "x" * 5000})  # longer than the name of any file may be
    path = tmp_path / "wanted"
    path.write_text(text)
    for value in (text, str(path)):
        generate(service, "once", f"--{option}", value)
    assert [getattr(asked.structured_output, option.replace("-", "_")) for asked in service.asked] == [text] * 2


def test_several_choices_come_under_headings(service: Service) -> None:
    result = generate(service, "once", "--n=2", "--echo")
    assert result.stdout.splitlines() == [
        "== prompt: 2 tokens",
        "once ",
        "== choice 0: 2 tokens, ended by its length",
        "upon 0",
        "== choice 1: 2 tokens, ended by its length",
        "upon 1",
    ]
    assert "4 generated in 2 choices on replica-0" in result.stderr


def test_log_probabilities_are_a_table_after_the_text(service: Service) -> None:
    result = generate(service, "once", "--echo", "--logprobs=1")
    text, header, *rows = result.stdout.splitlines()
    assert text == "once upon 0"
    assert header.split("\t") == ["part", "position", "token", "logprob", "alternatives"]
    assert [row.split("\t") for row in rows] == [
        ["prompt", "0", "7", "-", "-"],
        ["prompt", "1", "8", "-0.5000", "9:-0.2500"],
        ["choice 0", "0", "0", "-1.0000", "-"],
        ["choice 0", "1", "1", "-1.0000", "-"],
    ]


def test_a_prompt_may_be_looked_at_alone(service: Service) -> None:
    result = generate(service, "once", "--echo", "--max-tokens=0")
    assert result.stdout == "once \n"
    assert "0 generated" in result.stderr and "first token" not in result.stderr


def test_a_misspelt_variable_is_refused_before_a_service_is_asked(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETERODYNE_ADRESS", service.address)
    result = CliRunner().invoke(app, ["generate", "once"])
    assert result.exit_code == 1 and "Write HETERODYNE_ADDRESS" in result.stderr
    assert not service.asked


@pytest.mark.parametrize("log_format", ["auto", "json"])
def test_an_error_of_serve_is_one_line_in_every_format(log_format: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "missing.yaml"), "--log-format", log_format])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert not result.stdout
    if log_format == "json":
        said = json.loads(line)
        assert (said["event"], said["level"]) == ("error", "error") and "missing.yaml" in said["message"]
    else:
        assert line.startswith("error: ") and "missing.yaml" in line


def test_the_error_of_serve_comes_after_all_that_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, log: EventLog, **__: object) -> int:
        assert log.console.file is not sys.__stdout__
        for number in range(100):
            log.say("connect", "Joining.", number=number)
            log.pass_on("It runs.", "gateway")
        logging.getLogger("library").warning("It ends.")
        raise LaunchFailed("no room")

    monkeypatch.setattr("orchestrator.deployment.serve.serve", run)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    lines = result.output.splitlines()
    assert result.exit_code == 1 and len(lines) == 202
    assert "It ends." in lines[-2] and lines[-1] == "error: no room"


@pytest.mark.parametrize("entry", [["--version"], []])
def test_the_command_says_its_version_or_what_it_can_do(entry: list[str]) -> None:
    result = CliRunner().invoke(app, entry)
    words = f"heterodyne {metadata.version('heterodyne')}" if entry else "Usage: heterodyne"
    assert words in result.output


def test_help_speaks_plainly() -> None:
    generate = " ".join(CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "300"}).stdout.split())
    assert "generate at least this many tokens" in generate and "default: until the model ends" in generate
    status = CliRunner().invoke(app, ["status", "--help"], env={"COLUMNS": "300"}).stdout
    assert "one JSON document with stable names" in status
