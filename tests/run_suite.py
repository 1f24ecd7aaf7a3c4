"""All tests as ``make test`` runs them: what starts no process in several workers, the rest alone, and one account.

Tests of compiled code, marked ``every_target``, run again for each lesser kind of CPU whose code this one executes.

``python -m tests.run_suite [-n WORKERS] [PYTEST_ARGS ...]``. A test marked ``integration`` needs the machine for
itself, so those run one after the other once the others have ended. The account says where the time went, by folder
and by test, and ends in a line of all counts, with the reasons for skipping. Exits with 1 where a test failed or none
ran.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.cpu.machine.target import VARIABLE, is_forced, runnable_targets

NUM_SLOWEST = 15
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# How pytest ends: all passed, or nothing was selected, as when a part is asked for that has no such tests.
_FINE = (0, 5)
_OUTCOMES = {"failure": FAILED, "error": FAILED, "skipped": SKIPPED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One test that ran, or was skipped."""

    module: str  # as "tests.kernels.test_gptq"
    name: str
    outcome: str
    duration_s: float  # of its fixtures too, so far as it was the first to ask for them
    reason: str = ""  # why it was skipped
    target: str = ""  # the kind of CPU, where not the best

    @property
    def folder(self) -> str:
        """The folder of its module, as "tests/kernels", and the kind of CPU, as "(avx2)"."""
        return "/".join(self.module.split(".")[:-1]) + self.for_target

    @property
    def is_module(self) -> bool:
        """Whether it is a module none of whose tests ran: skipped or broken, which each part tells of again."""
        return self.module == self.name and self.name.startswith("tests.")

    @property
    def for_target(self) -> str:
        """The kind of CPU, as it is appended to a name."""
        return f" ({self.target})" if self.target else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call of pytest."""

    title: str
    exit_code: int
    wall_s: float
    tests: tuple[Ran, ...]


def read_report(xml: str) -> tuple[Ran, ...]:
    """The tests of a report in the JUnit format."""
    return tuple(_read(case) for case in ElementTree.fromstring(xml).iter("testcase"))


def _read(case: ElementTree.Element) -> Ran:
    """One case: of a module that could not be imported, its name is all that is told."""
    *module, name = [*case.get("classname", "").split("."), case.get("name", "")]
    skipped = case.find("skipped")
    of_class = [part for part in module if part.startswith("Test")]
    return Ran(
        module=".".join(part for part in module if part not in of_class) or name,
        name="::".join([*of_class, name]),
        outcome=next((_OUTCOMES[child.tag] for child in case if child.tag in _OUTCOMES), PASSED),
        duration_s=float(case.get("time", 0)),
        reason="" if skipped is None else _reason(skipped),
    )


def _reason(skipped: ElementTree.Element) -> str:
    """Why a test was skipped. Of a whole module the text has file, line and reason, as Python writes a tuple."""
    message = skipped.get("message", "")
    if message != "collection skipped":
        return message
    reason: str = ast.literal_eval(skipped.text or "")[2]
    return reason.removeprefix("Skipped: ")


def once_each(tests: Iterable[Ran]) -> list[Ran]:
    """Each test once, with all its time: the error of its fixtures' end is told as a case of its own, for example."""
    found: dict[tuple[str, str, str], Ran] = {}
    for test in tests:
        key = test.module, test.name, test.target
        before = found.setdefault(key, test)
        if before is not test:
            outcome = FAILED if FAILED in (before.outcome, test.outcome) else before.outcome
            duration_s = before.duration_s + test.duration_s
            found[key] = replace(before, outcome=outcome, duration_s=duration_s)
    return list(found.values())


def account(parts: Sequence[Part]) -> list[str]:
    """The lines that say where the time went; the last has all counts."""
    tests = once_each(test for part in parts for test in part.tests)
    by_folder: dict[str, list[float]] = defaultdict(list)
    for test in tests:
        by_folder[test.folder].append(test.duration_s)
    lines = [f"Where the time went ({', '.join(f'{part.title}: {part.wall_s:.0f} s' for part in parts)}):"]
    for folder, durations in sorted(by_folder.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(durations):8.1f} s {len(durations):5} tests  {folder}")
    lines.append(f"The {NUM_SLOWEST} slowest tests:")
    slowest = sorted(tests, key=lambda test: -test.duration_s)[:NUM_SLOWEST]
    for test in slowest:
        lines.append(f"{test.duration_s:8.1f} s  {test.module.replace('.', '/')}.py::{test.name}{test.for_target}")
    counts = Counter(test.outcome for test in tests)
    reasons = Counter(test.reason for test in tests if test.outcome == SKIPPED).most_common()
    why = f" ({'; '.join(f'{count} {reason}' for reason, count in reasons)})" if reasons else ""
    return [*lines, ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, FAILED, SKIPPED)) + why]


def has_passed(parts: Sequence[Part]) -> bool:
    """Whether each part is fine, and any test ran at all."""
    return all(part.exit_code in _FINE for part in parts) and any(part.tests for part in parts)


def run(title: str, args: Iterable[str], target: str = "") -> Part:
    """Call pytest and read its report; nothing was read where pytest ended before it wrote one.

    Args:
        target: the kind of CPU to compile for; the best, where it is empty.
    """
    environment = {**os.environ, VARIABLE: target} if target else None
    print(f"== {title}", flush=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *args]
        exit_code = subprocess.run(command, check=False, env=environment).returncode
        tests = read_report(report.read_text()) if report.exists() else ()
    tests = tuple(test if test.is_module else replace(test, target=target) for test in tests)
    return Part(title=title, exit_code=exit_code, wall_s=time.monotonic() - began_s, tests=tests)


def lesser_targets() -> tuple[str, ...]:
    """The kinds of CPU to compile for besides the best; none, where the environment names the only one to test."""
    return () if is_forced() else tuple(target.name for target in runnable_targets()[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", "--workers", type=int, default=2)
    options, rest = parser.parse_known_args()
    together = ["-n", str(options.workers), "--dist=worksteal"]
    parts = [
        run(f"in {options.workers} workers", [*together, "-m", "not integration", *rest]),
        *(run(f"for {name}", [*together, "-m", "every_target", *rest], name) for name in lesser_targets()),
        run("one after the other", ["-m", "integration", *rest]),
    ]
    print("\n".join(account(parts)), flush=True)
    return 0 if has_passed(parts) else 1


if __name__ == "__main__":
    sys.exit(main())
