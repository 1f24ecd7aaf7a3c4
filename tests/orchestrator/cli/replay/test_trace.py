"""Traces: what is read of each format, and what is refused by file, line, value and fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.replay.trace import TraceRequest, parse_trace, read_trace
from orchestrator.errors import InvalidTrace

TRACES = Path(__file__).resolve().parents[4] / "deploy" / "traces"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def row(**changes: Any) -> str:
    whole = {"timestamp": 40, "input_length": 600, "output_length": 3, "hash_ids": [7, 8]}
    return json.dumps(whole | changes)


def test_an_azure_trace_counts_time_from_its_first_request() -> None:
    requests = read_trace(TRACES / "azure-conversation.csv")
    assert len(requests) == 20
    assert requests[0] == TraceRequest(at_s=0.0, prompt_tokens=374, answer_tokens=44)
    assert requests[1].at_s == pytest.approx(4.314579, abs=1e-5)
    assert (requests[1].prompt_tokens, requests[1].answer_tokens) == (396, 109)


def test_a_mooncake_trace_has_the_blocks_of_its_prompts() -> None:
    requests = read_trace(TRACES / "mooncake-synthetic.jsonl")
    assert len(requests) == 60
    assert requests[5] == TraceRequest(at_s=0.529, prompt_tokens=28, answer_tokens=445, blocks=(298,))
    assert all(len(request.blocks or ()) == -(-request.prompt_tokens // 512) for request in requests)


def test_requests_come_in_the_order_of_time_with_other_columns_blank_lines_and_zones_aside() -> None:
    text = (
        "\ufeffid, TIMESTAMP ,ContextTokens,GeneratedTokens\n"
        "a,2024-05-10 02:00:01+02:00,5,6\n\n"
        "b,2024-05-10 00:00:00.5000000, 3 ,0\n"
    )
    requests = parse_trace(text.removeprefix("\ufeff"), name="t")
    assert [(request.at_s, request.prompt_tokens, request.answer_tokens) for request in requests] == [
        (0.0, 3, 0),
        (0.5, 5, 6),
    ]


def test_a_mark_of_byte_order_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n2023-11-16 18:15:46,1,2\r\n".encode())
    assert read_trace(path) == (TraceRequest(at_s=0.0, prompt_tokens=1, answer_tokens=2),)


@pytest.mark.parametrize(
    ("lines", "field", "value", "problem"),
    [
        ([""], "t, line 1", "", "has no column TIMESTAMP"),
        ([HEADER], "t", None, "holds no request"),
        (["TIMESTAMP,Tokens", "x,1"], "t, line 1", "TIMESTAMP,Tokens", "has no column ContextTokens"),
        ([HEADER, "2023-11-16 18:15:46,1,2", "yesterday,1,2"], "t, line 3, TIMESTAMP", "yesterday", "is no date"),
        ([HEADER, "2023-11-16 18:15:46,many,2"], "t, line 2, ContextTokens", "many", "is no number of tokens"),
        ([HEADER, "2023-11-16 18:15:46,1,-2"], "t, line 2, GeneratedTokens", "-2", "is no number of tokens"),
        ([HEADER, "2023-11-16 18:15:46,1"], "t, line 2", "2023-11-16 18:15:46,1", "has 2 values for 3 columns"),
        ([row(), "{"], "t, line 2", "{", "is no JSON object"),
        ([row(), "", "[1]"], "t, line 3", "[1]", "is no JSON object"),
        ([row(timestamp="1")], "t, line 1, timestamp", "1", "is no number of milliseconds"),
        ([row(timestamp=10**400)], "t, line 1, timestamp", 10**400, "is no number of milliseconds"),
        ([row(timestamp=float("nan"))], "t, line 1, timestamp", ..., "is no number of milliseconds"),
        ([row(input_length=True)], "t, line 1, input_length", True, "is no number of tokens"),
        ([row(output_length=2**31)], "t, line 1, output_length", 2**31, "is no number of tokens"),
        ([row(output_length=None)], "t, line 1, output_length", None, "is no number of tokens"),
        ([row(hash_ids=[1, -1])], "t, line 1, hash_ids", [1, -1], "is no list of whole numbers"),
        ([row(hash_ids=7)], "t, line 1, hash_ids", 7, "is no list of whole numbers"),
        ([row(hash_ids=[7])], "t, line 1, hash_ids", [7], "names 1 blocks of a prompt of 2"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_as_its_format_says_is_refused(
    lines: list[str], field: str, value: object, problem: str
) -> None:
    with pytest.raises(InvalidTrace) as caught:
        parse_trace("\n".join(lines), name="t")
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert value is ... or caught.value.value == value
    assert caught.value.fix and "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match="cannot be read: no such file or directory"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff")
    with pytest.raises(InvalidTrace, match="is not UTF-8 text"):
        read_trace(tmp_path / "picture.csv")
