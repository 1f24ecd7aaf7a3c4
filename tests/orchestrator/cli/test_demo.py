"""What the demo shows, and what it refuses."""

import io
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.cli.demo import DemoFailed, WrappedText, demo, demo_file, measurements
from placement.errors import InvalidConfig
from protos.heterodyne.v1 import inference_pb2 as pb

NO_HTTP = "gateway.http_address=null"


def shown(width: int, *pieces: str) -> str:
    out = io.StringIO()
    text = WrappedText(Console(file=out, width=width))
    for piece in pieces:
        text.write(piece)
    text.end()
    return out.getvalue()


def test_text_breaks_between_words_wherever_its_pieces_end() -> None:
    assert shown(11, "hel", "lo wo", "rld and", " more\n\nend") == "hello world\nand more\n\nend\n"


@settings(deadline=None)
@given(st.lists(st.text("ab \n", max_size=9), max_size=9), st.integers(3, 30))
def test_no_word_is_lost_and_no_line_is_too_long(pieces: list[str], width: int) -> None:
    words = "".join(pieces).split()
    out = shown(width, *pieces)
    assert out.split() == words
    assert all(len(line.rstrip()) <= width or line.split() == [line.strip()] for line in out.splitlines())


def measured(prefill_replica: str | None = None, transfer: pb.KvTransfer | None = None, **timings: float) -> str:
    out = io.StringIO()
    finished = pb.Finished(
        usage=pb.Usage(prompt_tokens=3, completion_tokens=1),
        timings=pb.Timings(**timings),
        replica="replica-0",
        prefill_replica=prefill_replica,
        transfer=transfer,
    )
    Console(file=out, width=100).print(measurements(finished))
    return out.getvalue()


def test_measurements_of_many_tokens_and_of_one() -> None:
    assert "100.0 tokens/s" in measured(time_to_first_token_s=0.02, time_per_output_token_s=0.01)
    one = measured(time_to_first_token_s=0.02)
    assert "time to first token" in one and "20.0 ms" in one and "tokens/s" not in one


def test_measurements_say_which_replica_computed_the_prompt_and_what_it_took_to_send_it() -> None:
    sent = pb.KvTransfer(num_tokens=64, num_bytes=2_500_000, prefill_s=0.25, exposed_s=0.004)
    split = measured("replica-1", sent, time_to_first_token_s=0.3)
    assert "250.0 ms, on replica-1; the answer on replica-0" in split
    assert "2.5 MB, of 64 tokens" in split and "4.0 ms" in split
    failed = measured(None, pb.KvTransfer(), time_to_first_token_s=0.3)
    assert "replica-0 computed the prompt itself after all" in failed
    assert "sent" not in measured(time_to_first_token_s=0.3)


def test_the_demo_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo_file() == Path("deploy/disaggregated.yaml")
    tree = Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert demo_file() == tree / "deploy/disaggregated.yaml"
    with pytest.raises(DemoFailed, match=r"was not installed. Run it there, or pass a cluster file of your own"):
        demo_file(tmp_path)


def test_an_open_port_is_refused() -> None:
    with pytest.raises(InvalidConfig) as caught:
        demo(Path("deploy/local.yaml"), overrides=["gateway.address=127.0.0.1:0"], console=Console(file=io.StringIO()))
    assert (caught.value.field, caught.value.value) == ("gateway.address", "127.0.0.1:0")


def test_ports_that_are_taken_are_told_at_once_with_what_to_run() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        taken = [f"127.0.0.1:{server.getsockname()[1]}" for server in (first, second)]
        sets = [f"gateway.address={taken[0]}", NO_HTTP, f"telemetry.prometheus_address={taken[1]}"]
        with pytest.raises(DemoFailed) as caught:
            demo(Path("deploy/local.yaml"), overrides=sets, console=Console(file=io.StringIO()))
    *told, run = str(caught.value).splitlines()
    assert all(f"is in use by another process (got '{address}')" in "\n".join(told) for address in taken)
    variables = (
        r"HETERODYNE_GATEWAY__ADDRESS=127\.0\.0\.1:\d+ HETERODYNE_TELEMETRY__PROMETHEUS_ADDRESS=127\.0\.0\.1:\d+"
    )
    assert re.fullmatch(rf"Run it on free ports: {variables} make demo", run)
    assert not any(f"={address} " in run for address in taken)


def test_of_one_taken_port_only_its_variable_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        sets = [f"gateway.address={address}", NO_HTTP, "telemetry.prometheus_address=null"]
        with pytest.raises(DemoFailed, match=r"^gateway\.address: is in use") as caught:
            demo(Path("deploy/local.yaml"), overrides=sets, console=Console(file=io.StringIO()))
    assert "Run it on free ports: HETERODYNE_GATEWAY__ADDRESS=" in str(caught.value)
    assert "PROMETHEUS" not in str(caught.value)
