"""The account that ``make test`` ends in."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.cpu.machine.target import VARIABLE, runnable_targets
from tests import run_suite
from tests.run_suite import FAILED, PASSED, SKIPPED, Part, Ran, account, has_passed, lesser_targets, read_report

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = """<testsuites name="pytest tests"><testsuite name="pytest">
<testcase classname="tests.kernels.cpu.test_rows" name="test_a[1]" time="1.500"/>
<testcase classname="tests.kernels.cpu.test_rows" name="test_b" time="0.500"><skipped message="no"/></testcase>
<testcase classname="tests.placement.serving.test_blocks.TestPool" name="runTest" time="4.0"/>
<testcase classname="tests.placement.serving.test_blocks" name="test_c" time="0"><failure message="x"/></testcase>
<testcase classname="tests.placement.serving.test_blocks" name="test_d" time="0"><error message="x"/></testcase>
</testsuite></testsuites>"""


def test_a_report_says_what_ran_and_how_it_ended() -> None:
    tests = read_report(REPORT)
    assert [test.outcome for test in tests] == [PASSED, SKIPPED, PASSED, FAILED, FAILED]
    assert [test.folder for test in tests] == ["tests/kernels/cpu"] * 2 + ["tests/placement/serving"] * 3
    assert tests[0] == Ran(module="tests.kernels.cpu.test_rows", name="test_a[1]", outcome=PASSED, duration_s=1.5)


def test_a_test_that_fails_twice_counts_once() -> None:
    """The report has the error of the fixtures' end as a case of its own."""
    case = '<testcase classname="tests.test_x" name="test_a" time="1.0"><failure/></testcase>'
    again = '<testcase classname="tests.test_x" name="test_a" time="0.5"><error/></testcase>'
    assert account([part(read_report(f"<a>{case}{again}</a>"))])[-1] == "0 passed, 1 failed, 0 skipped"
    passed = '<testcase classname="tests.test_x" name="test_a" time="1.0"/>'
    assert account([part(read_report(f"<a>{passed}{again}</a>"))])[-1] == "0 passed, 1 failed, 0 skipped"


def test_a_module_that_cannot_be_imported_counts_once_though_both_parts_tell_it() -> None:
    tests = read_report('<a><testcase classname="" name="tests.kernels.test_x" time="0.0"><error/></testcase></a>')
    assert tests[0].folder == "tests/kernels"
    assert account([part(tests), part(tests)])[-1] == "0 passed, 1 failed, 0 skipped"


def part(tests: tuple[Ran, ...], exit_code: int = 0) -> Part:
    return Part(title="alone", exit_code=exit_code, wall_s=7.4, tests=tests)


def test_the_account_adds_up_folders_and_ends_in_all_counts() -> None:
    tests = read_report(REPORT)
    lines = account([part(tests[:2]), part(tests[2:])])
    assert lines[0] == "Where the time went (alone: 7 s, alone: 7 s):"
    assert [line.split() for line in lines[1:3]] == [
        ["4.0", "s", "3", "tests", "tests/placement/serving"],
        ["2.0", "s", "2", "tests", "tests/kernels/cpu"],
    ]
    assert lines[-1] == "2 passed, 2 failed, 1 skipped (1 no)"


def test_each_reason_for_skipping_is_told_with_its_count() -> None:
    cases = [
        *(f'<testcase classname="tests.x" name="{i}"><skipped message="no GPU"/></testcase>' for i in (1, 2)),
        '<testcase classname="tests.x" name="3"><skipped message="no GPU; no network">file</skipped></testcase>',
        '<testcase classname="" name="tests.y"><skipped message="collection skipped">'
        "('/tests/y.py', 16, 'Skipped: no network')</skipped></testcase>",
    ]
    tests = read_report(f"<a>{''.join(cases)}</a>")
    assert [test.is_module for test in tests] == [False, False, False, True]
    assert [test.reason for test in tests] == ["no GPU", "no GPU", "no GPU; no network", "no network"]
    assert account([part(tests)])[-1] == (
        "0 passed, 0 failed, 4 skipped (2 no GPU; 1 no GPU; no network; 1 no network)"
    )


def test_a_test_counts_once_for_each_kind_of_cpu() -> None:
    tests = read_report('<a><testcase classname="tests.cpu.test_x" name="test_a" time="1.5"/></a>')
    lesser = tuple(replace(test, target="avx2") for test in tests)
    lines = account([part(tests), part(lesser)])
    assert "     1.5 s     1 tests  tests/cpu (avx2)" in lines
    assert "     1.5 s  tests/cpu/test_x.py::test_a (avx2)" in lines
    assert lines[-1] == "2 passed, 0 failed, 0 skipped"


def test_where_the_environment_names_a_kind_only_that_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_suite, "is_forced", lambda: False)
    assert lesser_targets() == tuple(target.name for target in runnable_targets()[1:])
    monkeypatch.setattr(run_suite, "is_forced", lambda: True)
    assert lesser_targets() == ()


def test_it_has_passed_where_both_parts_have_and_one_had_tests() -> None:
    some, none = read_report(REPORT), ()
    assert has_passed([part(some), part(some)]) and has_passed([part(some), part(none, exit_code=5)])
    assert not has_passed([part(some), part(some, exit_code=1)])
    assert not has_passed([part(none, exit_code=5), part(none, exit_code=5)])


def test_what_runs_in_workers_and_what_runs_alone_are_counted_together(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        """
import os, pytest
def test_in_a_worker(): assert "PYTEST_XDIST_WORKER" in os.environ
@pytest.mark.integration
def test_alone(): assert "PYTEST_XDIST_WORKER" in os.environ
@pytest.mark.every_target
def test_everywhere():
    from kernels.cpu.machine.target import chosen
    assert chosen().name == os.environ.get("HETERODYNE_CPU_TARGET", chosen().name)
    if not "HETERODYNE_CPU_TARGET" in os.environ: pytest.skip("the best")
"""
    )
    command = [sys.executable, "-m", "tests.run_suite", "-n", "1", "-c", str(REPOSITORY / "pyproject.toml"), str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_XDIST", VARIABLE))}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    lesser = [target.name for target in runnable_targets()[1:]]
    counts = f"{1 + len(lesser)} passed, 1 failed, 1 skipped (1 the best)"
    assert ended.stdout.splitlines()[-1] == counts, ended.stdout
    assert [line.removeprefix("== for ") for line in ended.stdout.splitlines() if "== for " in line] == lesser
