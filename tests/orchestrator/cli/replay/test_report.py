"""How a replay is told: on a terminal, in lines, as JSON, and while it runs."""

import io
import json
from dataclasses import replace

from rich.console import Console

from orchestrator.cli.replay.figures import sum_up
from orchestrator.cli.replay.outcome import OK, STOPPED, Outcome
from orchestrator.cli.replay.progress import progress_line, shown_progress
from orchestrator.cli.replay.report import ReplayReport, json_text, lines, table
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule
from orchestrator.cli.replay.sending import Progress
from orchestrator.cli.replay.slo import IdlePoint, Slo, slowdowns

PROGRESS = Progress(num_planned=9, num_sent=5, num_running=2, num_completed=2, num_failed=1)


def report() -> ReplayReport:
    """Of one request that is answered, one that fails, and one that is stopped."""
    stopped = Outcome(index=2, code=STOPPED, due_s=0.0, sent_s=0.01, prompt_tokens=100, ended_s=2.0)
    answered = replace(stopped, index=0, code=OK, token_times_s=(0.5, 1.0), cached_tokens=25)
    failed = replace(stopped, index=1, code="UNAVAILABLE", detail="gone\nfor good", ended_s=1.0)
    requests = [PlannedRequest(index=i, due_s=0.0, prompt_tokens=100, answer_tokens=2) for i in range(4)]
    schedule = Schedule(requests=tuple(requests), num_clipped=3, shared_tokens=200)
    outcomes, slo = (answered, failed, stopped), Slo(ttft_s=0.5, tbt_s=0.1)
    return ReplayReport(
        figures=sum_up(schedule, outcomes, slo),
        settings={"rate": 2.0},
        slo=slo,
        slowdowns=slowdowns(outcomes, [IdlePoint(prompt_tokens=100, ttft_s=0.25, tbt_s=0.5)]),
        is_stopped=True,
    )


def test_a_terminal_shows_a_table_and_sentences() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(table(report()))
    assert isinstance(console.file, io.StringIO)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
    assert "stopped: 1 of 4 requests answered in 2.0 s: 0.50 requests/s, 1.0 tokens/s" in text
    (first,) = [line for line in text.splitlines() if "(TTFT)" in line]
    assert first.split()[-6:] == ["1", "500.0", "500.0", "500.0", "500.0", "500.0"]
    for sentence in (
        "1 failed with UNAVAILABLE: gone for good",
        "1 were still running when it was stopped",
        "3 were shortened to fit the context",
        "prefix cache: 25.0% of the prompt tokens were found; a perfect cache would find 50.0%",
        "goodput: 0 requests kept TTFT <= 500 ms and mean TBT <= 100 ms: 0.0%, 0.00 a second",
        "TTFT as a multiple of that of an idle service: P50 2.00 (at most 2), P90 2.00 (at most 3), "
        "P99 2.00 (at most 6)",
        "E2E as a multiple of that of an idle service: P50 2.67 (at most 1.25, missed), "
        "P90 2.67 (at most 1.5, missed), P99 2.67 (at most 5)",
    ):
        assert sentence in text.splitlines(), sentence


def test_lines_are_pairs() -> None:
    said = list(lines(report()))
    assert said[0] == (
        "event=replay planned=4 sent=3 completed=1 failed=1 stopped=1 clipped=3 interrupted=true span_s=2.000 "
        "requests_per_s=0.500 answer_tokens_per_s=1.0"
    )
    assert 'event=errors code=UNAVAILABLE count=1 first="gone for good"' in said
    assert "event=slowdown metric=ttft percentile=50 measured=2.000 limit=2 kept=true" in said
    assert "event=prefix prompt_tokens=100 cached_tokens=25 hit_rate=0.2500 shared_in_trace=0.5000" in said
    assert "event=goodput ttft_s=0.5000 tbt_s=0.1000 num_kept=0 share=0.0000 per_s=0.0000" in said


def test_json_has_the_same_names_whatever_was_measured() -> None:
    whole = json.loads(json_text(report()))
    nothing = ReplayReport(
        figures=sum_up(Schedule(requests=(), num_clipped=0, shared_tokens=0), []), settings={"rate": 1.0}
    )
    empty = json.loads(json_text(nothing))
    assert list(whole) == list(empty)
    assert whole["errors"] == {"UNAVAILABLE": {"count": 1, "first": "gone\nfor good"}}
    assert whole["slo"] == {"ttft_s": 0.5, "tbt_s": 0.1} and whole["slowdowns"][0]["kept"] is True
    assert empty["ttft_s"] is None and empty["goodput"] is None and empty["prefix"]["hit_rate"] is None


def test_progress_is_a_line_every_few_seconds_where_there_is_no_terminal() -> None:
    times = iter((0.0, 1.0, 5.0, 6.0, 10.0))
    console = Console(file=io.StringIO(), width=20)
    assert isinstance(console.file, io.StringIO)
    with shown_progress(console, lambda: next(times)) as show:
        show(PROGRESS)
        assert console.file.getvalue() == ""
        for _ in range(3):
            show(PROGRESS)
    line = "event=replaying planned=9 sent=5 running=2 completed=2 failed=1"
    assert progress_line(PROGRESS) == line
    assert console.file.getvalue() == f"{line}\n{line}\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    assert isinstance(console.file, io.StringIO)
    with shown_progress(console) as show:
        show(PROGRESS)
    assert "3/9" in console.file.getvalue() and "2 running, 1 failed" in console.file.getvalue()
