"""Owns what an answer must match: grammars compiled for one model's tokenizer, and how far each answer has come.

llguidance does the work: an Earley parser over a lexer of regular-expression derivatives, walked along the trie of
the vocabulary, gives the tokens that may come next. Answers to one grammar share its lexer, which is built as it is
used: the first answer pays for it, and the masks of the others take half the time.

Whitespace in JSON is the model's choice, as in llguidance and vLLM, but at most 32 characters of it between two
tokens of JSON: where there is no limit, a weak model fills the rest of its context with blanks.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from placement.errors import InvalidRequest, cause_of
from placement.serving.grammar import JSON_OPTIONS, MAX_SOURCE_BYTES
from workers.sampling.grammar_state import (
    Grammar,
    GrammarFailed,
    GrammarSpec,
    GrammarState,
    fill_all,
    prefetch,
    problem_of,
)

__all__ = [
    "Grammar",
    "GrammarFactory",
    "GrammarFailed",
    "GrammarSpec",
    "GrammarState",
    "InvalidGrammar",
    "fill_all",
    "prefetch",
]

logger = logging.getLogger(__name__)

# Grammars that are kept compiled, about 0.1 MB each where nothing is unusual.
_MAX_CACHED = 32


class InvalidGrammar(InvalidRequest):
    """A grammar that no answer can be held to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """What compiling needs of the model."""

    tokenizer: LLTokenizer
    executor: LLExecutor


class GrammarFactory:
    """Compiles grammars for the tokenizer of one model.

    Args:
        directory: the model's, with its tokenizer.json.
        vocab_size: the model's, padding included; ids that the tokenizer does not know are never allowed.
        eos_token_ids: the model's end-of-sequence ids.
    """

    def __init__(self, directory: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path = directory / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._limits = LLParserLimits(verbose_errors=False)
        self._lock = threading.Lock()
        self._tools: _Tools | str | None = None
        self._cache: OrderedDict[GrammarSpec, Grammar] = OrderedDict()

    def prepare(self) -> None:
        """Reads the tokenizer, unless that is done; else the first ``compile`` does.

        It keeps the interpreter's lock meanwhile, some 10 us a token of the vocabulary: better before anything is
        served. A tokenizer that cannot be followed is what ``compile`` then refuses grammars for.
        """
        with self._lock:
            if self._tools is None:
                self._tools = self._open()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar, from the cache where it was asked for lately. On any thread.

        Compiling takes a millisecond for a common schema and can take 100s, without the interpreter's lock.

        Raises:
            InvalidGrammar: the source is no such grammar, matches nothing, or is too large; or the model's tokenizer
                cannot be followed.
        """
        if len(spec.source.encode()) > MAX_SOURCE_BYTES:
            raise _refusal(spec, f"is longer than {MAX_SOURCE_BYTES} bytes", "Send a shorter one.")
        self.prepare()
        tools = self._tools
        if not isinstance(tools, _Tools):
            raise _refusal(spec, f"cannot be followed: {tools}", "Send the request without structured_output.")
        with self._lock:
            cached = self._cache.get(spec)
            if cached is not None:
                self._cache.move_to_end(spec)
        # Answers share a lexer; where one of them brought it to its limits, the next gets a new one.
        if cached is not None and not _stuck(cached.origin):
            return cached
        grammar = Grammar(
            origin=self._matcher(spec, tools.tokenizer),
            executor=tools.executor,
            eos_token_ids=frozenset(self._eos_token_ids),
        )
        with self._lock:
            self._cache[spec] = grammar
            self._cache.move_to_end(spec)
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _matcher(self, spec: GrammarSpec, tokenizer: LLTokenizer) -> LLMatcher:
        try:
            matcher = LLMatcher(tokenizer, _llguidance_source(spec), log_level=0, limits=self._limits)
        except ValueError as error:  # the JSON text; everything else is the matcher's own error
            raise _refusal(spec, f"is not a JSON Schema: {problem_of(str(error))}", "Correct it.") from error
        if matcher.is_error():
            raise _refusal(spec, problem_of(matcher.get_error()), "Correct it, or send a simpler one.")
        # The first mask finds what can match nothing, and saves the first answer from waiting for it.
        problem = _stuck(matcher)
        if problem:
            raise _refusal(spec, f"cannot be matched: {problem}", "Correct it, or send a simpler one.")
        return matcher

    def _open(self) -> _Tools | str:
        """Or why there are none."""
        if not self._eos_token_ids:
            return "this model has no end-of-sequence id"
        try:
            tokenizer = LLTokenizer(
                self._path.read_text(encoding="utf-8"),
                n_vocab=self._vocab_size,
                eos_token=list(self._eos_token_ids),
            )
        except (OSError, ValueError) as error:
            logger.warning("no_structured_output cause=%s", cause_of(error))
            return "this model's tokenizer.json is of another kind"
        return _Tools(tokenizer=tokenizer, executor=LLExecutor(1))


def _llguidance_source(spec: GrammarSpec) -> str:
    """Raises ValueError for a JSON Schema that is not a JSON object."""
    match spec.kind:
        case "json_schema":
            # With options the text is parsed; without, it would be pasted into a larger one.
            return LLMatcher.grammar_from_json_schema(spec.source, overrides=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.source)
        case "lark":
            return LLMatcher.grammar_from_lark(spec.source)


def _stuck(origin: LLMatcher) -> str:
    """Why no answer can begin; empty where one can."""
    matcher = origin.deep_copy()
    matcher.compute_bitmask()
    return problem_of(matcher.get_error()) if matcher.is_error() else ""


def _refusal(spec: GrammarSpec, problem: str, fix: str) -> InvalidGrammar:
    value = f"{spec.kind} of {len(spec.source)} characters"
    return InvalidGrammar(field="grammar", value=value, problem=problem, fix=fix)
