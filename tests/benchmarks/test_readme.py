"""Every command of this folder's README is one of the Makefile, with options that its script takes.

That the scripts run, small, is tested beside each of them.
"""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "tests/benchmarks/README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def script_and_options(command: str) -> list[str]:
    """Returns the script that the Makefile runs for a command, and its options."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "setup", *shlex.split(command)[1:]],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in shown.stdout.splitlines() if "tests/benchmarks/" in line]
    words = shlex.split(line)
    return words[next(at for at, word in enumerate(words) if word.startswith("tests/benchmarks/")) :]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10 and all(command.startswith("make bench-") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_a_script_with_options_that_it_takes(command: str) -> None:
    script, *options = script_and_options(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parse"):
        assert vars(module.parse(options))["output"]
    else:
        assert callable(module.main) and (not options or module.wanted(options))


def test_what_the_tables_name_is_among_the_commands() -> None:
    named = re.findall(r"`(make bench-[^`]*)`", TEXT)
    assert named and set(named) <= set(COMMANDS)
    options = re.findall(r"\| `(--only [^`]*)` \|", TEXT)
    assert options and all(f'make bench-parallel BENCH_ARGS="{option}"' in COMMANDS for option in options)
