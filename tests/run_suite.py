"""All tests as ``make test`` runs them: what starts no process in several workers, the rest alone, and one account.

``python -m tests.run_suite [-n WORKERS] [PYTEST_ARGS ...]``. A test marked ``integration`` needs the machine for
itself, so those run one after the other once the others have ended. The account says where the time went, by folder
and by test, and ends in a line of all counts. Exits with 1 where a test failed or none ran.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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

    @property
    def folder(self) -> str:
        """The folder of its module, as "tests/kernels"."""
        return "/".join(self.module.split(".")[:-1])


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
    of_class = [part for part in module if part.startswith("Test")]
    return Ran(
        module=".".join(part for part in module if part not in of_class) or name,
        name="::".join([*of_class, name]),
        outcome=next((_OUTCOMES[child.tag] for child in case if child.tag in _OUTCOMES), PASSED),
        duration_s=float(case.get("time", 0)),
    )


def once_each(tests: Iterable[Ran]) -> list[Ran]:
    """Each test once, with all its time: the error of its fixtures' end is told as a case of its own, for example."""
    found: dict[tuple[str, str], Ran] = {}
    for test in tests:
        before = found.setdefault((test.module, test.name), test)
        if before is not test:
            outcome = FAILED if FAILED in (before.outcome, test.outcome) else before.outcome
            duration_s = before.duration_s + test.duration_s
            found[test.module, test.name] = replace(before, outcome=outcome, duration_s=duration_s)
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
    lines += [f"{test.duration_s:8.1f} s  {test.module.replace('.', '/')}.py::{test.name}" for test in slowest]
    counts = Counter(test.outcome for test in tests)
    return [*lines, ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, FAILED, SKIPPED))]


def has_passed(parts: Sequence[Part]) -> bool:
    """Whether each part is fine, and any test ran at all."""
    return all(part.exit_code in _FINE for part in parts) and any(part.tests for part in parts)


def run(title: str, args: Iterable[str]) -> Part:
    """Call pytest and read its report; nothing was read where pytest ended before it wrote one."""
    print(f"== {title}", flush=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *args]
        exit_code = subprocess.run(command, check=False).returncode
        tests = read_report(report.read_text()) if report.exists() else ()
    return Part(title=title, exit_code=exit_code, wall_s=time.monotonic() - began_s, tests=tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", "--workers", type=int, default=2)
    options, rest = parser.parse_known_args()
    together = ["-n", str(options.workers), "--dist=worksteal", "-m", "not integration", *rest]
    parts = [
        run(f"in {options.workers} workers", together),
        run("one after the other", ["-m", "integration", *rest]),
    ]
    print("\n".join(account(parts)), flush=True)
    return 0 if has_passed(parts) else 1


if __name__ == "__main__":
    sys.exit(main())
