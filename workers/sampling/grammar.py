"""Compiles grammars for one model's tokenizer: they say what an answer must match.

llguidance does the work: an Earley parser over a lexer of regular-expression derivatives walks the trie of the
vocabulary, and finds the tokens that may come next. Answers to one grammar share its lexer, which is built while it is
used: the first answer pays for it, and the masks of the others take half the time.

JSON has no whitespace between its tokens, unless a schema asks for it: then the model chooses it, as in llguidance and
vLLM, but at most 32 characters at a place. Without a limit, a weak model fills the rest of its context with blanks.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from placement.errors import InvalidModel, InvalidRequest, cause_of
from placement.model.tokenizer_json import CompleteTokenizer
from placement.serving.grammar import MAX_SOURCE_BYTES, json_options
from protos.codec.log_record import said
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

# The number of grammars that are kept compiled, of about 0.1 MB each where nothing is unusual.
_MAX_CACHED = 32


class InvalidGrammar(InvalidRequest):
    """A grammar that no answer can be held to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """The tokenizer, and the executor that fills masks."""

    tokenizer: LLTokenizer
    executor: LLExecutor


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoTools:
    """The reason why no grammar can be followed with this model."""

    problem: str


class GrammarFactory:
    """Compiles grammars for the tokenizer of one model.

    Args:
        read: reads the model's tokenizer; it raises InvalidModel where it cannot.
        vocab_size: the model's, padding included; ids that the tokenizer does not know are never allowed.
        eos_token_ids: the model's end-of-sequence ids.
    """

    def __init__(self, read: Callable[[], CompleteTokenizer], *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._read = read
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._limits = LLParserLimits(verbose_errors=False)
        self._lock = threading.Lock()
        self._tools: _Tools | _NoTools | None = None
        self._cache: OrderedDict[GrammarSpec, Grammar] = OrderedDict()

    def prepare(self) -> None:
        """Reads the tokenizer, unless that is done. Otherwise the first ``compile`` does it.

        Reading holds the interpreter's lock for some 10 us a token of the vocabulary, so it is best done before
        anything is served. ``compile`` refuses all grammars where the tokenizer cannot be followed.
        """
        with self._lock:
            if self._tools is None:
                self._tools = self._open()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Compiles a grammar, or takes it from the cache where it was used lately. Any thread may call it.

        Compiling takes a millisecond for a common schema and can take hundreds, without the interpreter's lock.

        Raises:
            InvalidGrammar: the source is no grammar of this kind, matches nothing, or is too large; or the model's
                tokenizer cannot be followed.
        """
        if len(spec.source.encode()) > MAX_SOURCE_BYTES:
            raise _refusal(spec, f"is longer than {MAX_SOURCE_BYTES} bytes", "Send a shorter one.")
        self.prepare()
        tools = self._tools
        assert tools is not None, "prepare() sets it"
        if isinstance(tools, _NoTools):
            raise _refusal(spec, f"cannot be followed: {tools.problem}", "Send the request without structured_output.")
        with self._lock:
            cached = self._cache.get(spec)
            if cached is not None:
                self._cache.move_to_end(spec)
        # Answers share a lexer; once one of them has brought it to its limits, the next gets a new one.
        if cached is not None and _begin_problem(cached.origin) is None:
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
        # The first mask shows whether anything can match, and the first answer need not wait for it.
        problem = _begin_problem(matcher)
        if problem is not None:
            raise _refusal(spec, f"cannot be matched: {problem}", "Correct it, or send a simpler one.")
        return matcher

    def _open(self) -> _Tools | _NoTools:
        """Reads the tokenizer."""
        if not self._eos_token_ids:
            return _NoTools(problem="this model has no end-of-sequence id")
        try:
            complete = self._read()
            # The library refuses ids that the tokenizer lacks; no grammar could end with one of them.
            known = complete.known(self._eos_token_ids)
            if not known:
                return _NoTools(problem="this model's tokenizer lacks its end-of-sequence id")
            tokenizer = LLTokenizer(complete.text, n_vocab=self._vocab_size, eos_token=known)
        except (InvalidModel, OSError, ValueError) as error:
            words = "This model's tokenizer allows no structured output: %s"
            logger.warning(words, cause_of(error), extra=said("no_structured_output", cause=cause_of(error)))
            return _NoTools(problem="this model's tokenizer.json is of another kind")
        return _Tools(tokenizer=tokenizer, executor=LLExecutor(1))


def _llguidance_source(spec: GrammarSpec) -> str:
    """Writes a grammar in llguidance's form. Raises ValueError for a JSON Schema that is not a JSON object."""
    match spec.kind:
        case "json_schema":
            # With options the text is parsed; without them it would be pasted into a larger one.
            return LLMatcher.grammar_from_json_schema(spec.source, overrides=json_options(spec.source))
        case "regex":
            return LLMatcher.grammar_from_regex(spec.source)
        case "lark":
            return LLMatcher.grammar_from_lark(spec.source)


def _begin_problem(origin: LLMatcher) -> str | None:
    """Says why no answer can begin; None where one can."""
    matcher = origin.deep_copy()
    matcher.compute_bitmask()
    return problem_of(matcher.get_error()) if matcher.is_error() else None


def _refusal(spec: GrammarSpec, problem: str, fix: str) -> InvalidGrammar:
    value = f"{spec.kind} of {len(spec.source)} characters"
    return InvalidGrammar(field="grammar", value=value, problem=problem, fix=fix)
