"""Compiles clients' grammars where they can do no harm: ``python -m orchestrator.gateway.request.structured_trial``.

The process reads lines of JSON from standard input: first the tokenizer, then grammars. Each grammar is compiled, and
followed for a few tokens, in a process forked for it alone, with limits of time and memory. A second process waits for
that one, so that there is a verdict even where it crashed. A line is written for each: its id, and its problem or null.

This is a process of its own so that it can fork: it has one thread, and reads the tokenizer once.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TypedDict

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from orchestrator.brief import brief
from orchestrator.model_dir.directory import read_tokenizer_of
from placement.errors import HeterodyneError
from placement.serving.grammar import GrammarKind, json_options

# Of the processor. A common grammar takes a millisecond.
MAX_COMPILE_S = 3
MAX_MASK_S = 0.25
MAX_GROWTH_BYTES = 64 * 1024**2
# What a trial may take on top of what it is forked with, the tokenizer above all.
_MAX_MORE_BYTES = 256 * 1024**2
# Where the system does not say how much that is.
_MAX_ADDRESS_BYTES = 8 * 1024**3
_STATM = "/proc/self/statm"
_NUM_WALKS, _NUM_STEPS = 2, 24


class Setup(TypedDict):
    """The first line. ``tokenizer`` holds the JSON of a tokenizer that is in no file."""

    directory: str | None
    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]


class Trial(TypedDict):
    """Every other line."""

    id: int
    kind: GrammarKind
    source: str


class Verdict(TypedDict):
    """The line that is written for each trial."""

    id: int
    problem: str | None


def problem_of(trial: Trial, tokenizer: LLTokenizer) -> str | None:
    """Returns why the grammar cannot be used, in a clause, or None where it can."""
    before = _peak_bytes()
    try:
        matcher = LLMatcher(tokenizer, _source(trial), log_level=0, limits=LLParserLimits(verbose_errors=False))
    except ValueError as error:
        return f"does not compile: {_reason(str(error))}"
    if matcher.is_error():
        return f"does not compile: {_reason(matcher.get_error())}"
    for seed in range(_NUM_WALKS):
        problem = _walk(matcher.deep_copy(), random.Random(seed), set(tokenizer.eos_tokens))
        if problem is not None:
            return problem
    return "needs too much memory" if _peak_bytes() - before > MAX_GROWTH_BYTES else None


def _source(trial: Trial) -> str:
    match trial["kind"]:
        case "json_schema":
            # With an option the text is parsed; without, it would be pasted into a larger one.
            return LLMatcher.grammar_from_json_schema(trial["source"], overrides=json_options(trial["source"]))
        case "regex":
            return LLMatcher.grammar_from_regex(trial["source"])
        case "lark":
            return LLMatcher.grammar_from_lark(trial["source"])


def _walk(matcher: LLMatcher, choice: random.Random, eos_token_ids: set[int]) -> str | None:
    """Follows the grammar for some tokens; returns why that fails, or None."""
    for _ in range(_NUM_STEPS):
        if matcher.is_stopped():
            return None
        started_s = time.process_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        token_id = _pick(mask, choice)
        if not matcher.is_error() and token_id not in eos_token_ids:
            matcher.consume_token(token_id)
        if matcher.is_error():
            return f"cannot be followed: {_reason(matcher.get_error())}"
        if time.process_time() - started_s > MAX_MASK_S:
            return "takes too long for each token"
    return None


def _pick(mask: int, choice: random.Random) -> int:
    """Returns the first token that the mask allows, counted from a random place."""
    start = choice.randrange(mask.bit_length())
    rest = mask >> start
    return start + (rest & -rest).bit_length() - 1


def _reason(error: str) -> str:
    lines = error.strip().splitlines() or ["is not known"]
    if lines[0].startswith("NoExtension"):
        return "it comes to a point where no token fits"
    # A regular expression's error ends in the reason; a grammar's begins with it.
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return brief(reason.removeprefix("error: "))


def _peak_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _address_bytes() -> int:
    """Returns how much memory this process may map: some more than it has mapped."""
    if not os.path.exists(_STATM):
        return _MAX_ADDRESS_BYTES
    with open(_STATM) as statm:
        return int(statm.read().split()[0]) * resource.getpagesize() + _MAX_MORE_BYTES


def _run_trial(trial: Trial, tokenizer: LLTokenizer, out: int) -> None:
    """Runs the trial, in the process that may be lost, and writes the problem to ``out``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash says much, and some of it is the client's
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_COMPILE_S, MAX_COMPILE_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_address_bytes(),) * 2)
    signal.alarm(4 * MAX_COMPILE_S)
    os.write(out, json.dumps(problem_of(trial, tokenizer)).encode())


def _supervise(trial: Trial, tokenizer: LLTokenizer) -> str | None:
    """Runs the trial in a process of its own and waits for it; returns the problem, or None."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _run_trial(trial, tokenizer, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        problem: str | None = json.loads(said)
        return problem
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    overdue = killed_by in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
    return "takes too long to compile" if overdue else "is more than the compiler can take"


def _read_tokenizer(setup: Setup) -> LLTokenizer | None:
    """Returns the tokenizer, or None where the library cannot follow it; a worker, which reads it too, says why."""
    vocab_size, eos, source = setup["vocab_size"], setup["eos_token_ids"], setup["tokenizer"]
    try:
        if setup["directory"] is not None:
            complete = read_tokenizer_of(Path(setup["directory"]), vocab_size=vocab_size)
            source, eos = complete.text, complete.known(eos)
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=eos)
    except (OSError, ValueError, HeterodyneError):
        return None


def main() -> int:
    """Serves until standard input ends; returns the exit code."""
    tokenizer = _read_tokenizer(json.loads(sys.stdin.buffer.readline()))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who judge
    for line in sys.stdin.buffer:
        if os.fork() == 0:
            try:
                trial: Trial = json.loads(line)
                problem = (
                    _supervise(trial, tokenizer) if tokenizer else "cannot be followed with this model's tokenizer"
                )
                # Written at once, and so arrives whole: a problem is brief, and this far below 4096 bytes.
                os.write(1, json.dumps(Verdict(id=trial["id"], problem=problem)).encode() + b"\n")
            finally:
                os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
