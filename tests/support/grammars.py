"""Provides grammars of every kind for the demo model's tokenizer, and reads their masks as rows of booleans."""

import json
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from workers.host.model_files import read_tokenizer_of
from workers.sampling.grammar import Grammar, GrammarFactory, GrammarFailed, GrammarSpec, GrammarState

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
# The demo tokenizer has 4096 tokens; the rest pads the vocabulary, as models do.
VOCAB_SIZE, NUM_WORDS = 4107, 129
EOS = (1, 0)
MAX_TOKENS = 200

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 3},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: tuple[dict[str, object], ...] = (
    {},
    {"type": "object"},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "string", "maxLength": 8},
    {"type": "string", "pattern": "^(foo|bar)+[0-9]?$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["integer", "null"]},
    {"type": "integer", "minimum": -17, "exclusiveMaximum": 1042},
    {"type": "number", "minimum": 0.25, "maximum": 1.5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10_000},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "null"}], "items": False},
    {"enum": ["a", "ab", 'q"\\uote', "Grüße, 世界 😀", 1, 1.5, None, True, {"k": [1, {}]}]},
    {"const": {"text": 'line\nbreak\t"quoted" \\ \u0001 é'}},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}, {"type": "array", "maxItems": 1}]},
    {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 20}]},
    {"type": "object", "properties": {"grüße": {"const": "ё"}, "b": {"type": "null"}}, "required": ["b", "grüße"]},
    {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
    TREE,
    PERSON,
)
REGEXES = (
    "[a-z]{3,9}",
    r"[0-9]{4}-[01][0-9](-[0-3][0-9])?",
    "(yes|no|maybe)",
    "^anchored (at|on) both$",
    r"[A-Z][a-z]*( [A-Z][a-z]*){0,2}",
    "Grüße|世界|😀{2}",
    r"[α-ωа-я]{1,6}",
    r'"([^"\\]|\\.){0,10}"',
    "(a|b)*a(a|b){8}",
    r"a/b\n?|/",
    "x?",
)
LARK = """
start: expr
expr: term (("+" | "-") term)*
term: NUMBER | "(" expr ")"
NUMBER: /[0-9]{1,3}/
"""


class GatedFactory(GrammarFactory):
    """A factory that compiles once its gate is open, and records what it was asked for and when."""

    def __init__(self) -> None:
        read = partial(read_tokenizer_of, DEMO, vocab_size=VOCAB_SIZE)
        super().__init__(read, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.calls: list[GrammarSpec] = []

    def compile(self, spec: GrammarSpec) -> Grammar:
        self.calls.append(spec)
        self.entered.release()
        assert self.gate.wait(60.0)
        return super().compile(spec)


def grammar_factory(directory: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> GrammarFactory:
    """A factory for the tokenizer of a model directory."""
    read = partial(read_tokenizer_of, directory, vocab_size=vocab_size)
    return GrammarFactory(read, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def json_schema(schema: object) -> GrammarSpec:
    return GrammarSpec(kind="json_schema", source=json.dumps(schema))


def regex(source: str) -> GrammarSpec:
    return GrammarSpec(kind="regex", source=source)


def lark(source: str) -> GrammarSpec:
    return GrammarSpec(kind="lark", source=source)


def allowed(state: GrammarState) -> Tensor:
    """Returns the tokens that may come next, as bool [V]."""
    row = torch.zeros(NUM_WORDS, dtype=torch.int32)
    assert state.fill(row)
    return bits(row)


def bits(row: Tensor) -> Tensor:
    """Reads the bits of one mask as bool [V]; none is set past the vocabulary."""
    every = (row[:, None] >> torch.arange(32) & 1).bool().flatten()
    assert not every[VOCAB_SIZE:].any()
    return every[:VOCAB_SIZE]


def generate(state: GrammarState, seed: int, closing: Tensor, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Draws tokens from random logits until the grammar is done. Returns them without an end-of-sequence id."""
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    while not state.done and len(token_ids) < max_tokens:
        # The end comes nearer with every token, so that most answers reach it.
        logits = 3.0 * torch.randn(VOCAB_SIZE, generator=generator) + closing * (1 + len(token_ids) / 20)
        token_id = int(logits.masked_fill(~allowed(state), -torch.inf).argmax())
        state.accept(token_id)
        if token_id in EOS:
            assert state.done
        else:
            token_ids.append(token_id)
    return token_ids


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False))


def after(token_ids: Iterable[int], state: GrammarState) -> GrammarState:
    for token_id in token_ids:
        state.accept(token_id)
    return state


def feed(state: GrammarState, tokenizer: Tokenizer, text: str) -> GrammarState:
    return after(tokenizer.encode(text, add_special_tokens=False).ids, state)


def follows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Tells whether ``text`` as a whole matches."""
    try:
        state = feed(grammar.start(), tokenizer, text)
    except GrammarFailed:
        return False
    return bool(allowed(state)[EOS[0]])
