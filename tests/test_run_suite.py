"""The account that ``make test`` ends in."""

import os
import subprocess
import sys
from pathlib import Path

from tests.run_suite import FAILED, PASSED, SKIPPED, Part, Ran, account, has_passed, read_report

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
    assert lines[-1] == "2 passed, 2 failed, 1 skipped"


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
"""
    )
    command = [sys.executable, "-m", "tests.run_suite", "-n", "1", "-c", str(REPOSITORY / "pyproject.toml"), str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "1 passed, 1 failed, 0 skipped", ended.stdout
