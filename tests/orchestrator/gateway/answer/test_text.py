from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from orchestrator.gateway.answer.detokenizer import (
    MAX_PENDING_TOKENS,
    ByteDecoder,
    Detokenizer,
    TokenBytes,
    WindowDecoder,
)
from orchestrator.gateway.answer.text import TextStream

SAMPLES = [
    "hello world, hello there",
    "naïve café, über",
    "你好世界 你好",
    "👩‍👩‍👧 family 😀😁",
    "привет мир",
    "a\n\nb\r\n",
]


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    return tokenizer


def make_byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a leading ▁, other characters as single bytes."""
    words = ["<unk>", "<bos>", "▁a", "▁b", "c"]
    vocab = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def windowed(tokenizer: Tokenizer) -> Tokenizer:
    """The same, with a decoder of which nothing is known."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.decoder = decoders.Sequence([copy.decoder])
    return copy


BPE = train_byte_level()
BPE_IN_WINDOWS = windowed(BPE)
FALLBACK = make_byte_fallback()
BOTH_WAYS = pytest.mark.parametrize("tokenizer", [BPE, BPE_IN_WINDOWS], ids=["bytes", "windows"])


def ids_of(text: str) -> list[int]:
    ids: list[int] = BPE.encode(text).ids
    return ids


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


def fallback_bytes(data: bytes) -> list[int]:
    return [id_of(FALLBACK, f"<0x{byte:02X}>") for byte in data]


EOS = id_of(BPE, "<eos>")


def stream(
    ids: list[int], stop: list[str], prompt_ids: list[int], tokenizer: Tokenizer
) -> tuple[list[str], str | None]:
    """The text of each delta, and the stop string that ended the answer."""
    text = TextStream(Detokenizer(tokenizer), stop, prompt_ids)
    deltas = []
    for token_id in ids:
        delta = text.push(token_id)
        deltas.append(delta.text)
        if delta.matched_stop is not None:
            assert text.finish().text == ""
            return deltas, delta.matched_stop
    last = text.finish()
    return [*deltas, last.text], last.matched_stop


def stream_runs(
    runs: list[list[int]], stop: list[str], prompt_ids: list[int], tokenizer: Tokenizer
) -> tuple[str, str | None, int]:
    """As ``stream`` with tokens in runs: the whole text, the stop string, and how many tokens belong to the answer."""
    text, joined, num_tokens = TextStream(Detokenizer(tokenizer), stop, prompt_ids), "", 0
    for run in runs:
        delta = text.push(*run)
        joined += delta.text
        num_tokens += delta.num_tokens
        if delta.matched_stop is not None:
            return joined, delta.matched_stop, num_tokens
        assert delta.num_tokens == len(run)
    last = text.finish()
    return joined + last.text, last.matched_stop, num_tokens


def split(ids: list[int], lengths: list[int]) -> list[list[int]]:
    runs, rest = [], list(ids)
    for length in lengths:
        runs.append(rest[:length])
        rest = rest[length:]
    return [run for run in [*runs, rest] if run]


def cut(text: str, stop: list[str]) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


UNICODE = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)
ANY_IDS = st.lists(st.integers(0, BPE.get_vocab_size() - 1), max_size=30)  # broken characters included
IDS = st.one_of(st.one_of(UNICODE, st.sampled_from(SAMPLES)).map(ids_of), ANY_IDS)


@BOTH_WAYS
@settings(deadline=None)
@given(ids=IDS, prompt_ids=IDS)
def test_deltas_joined_are_the_decoded_text(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int]) -> None:
    deltas, matched = stream(ids, [], prompt_ids, tokenizer)
    assert "".join(deltas) == BPE.decode(ids, skip_special_tokens=True)
    assert matched is None


@BOTH_WAYS
@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=st.text(alphabet="ab😀\n", max_size=14))
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, data: st.DataObject, text: str) -> None:
    stop = data.draw(st.lists(st.text(alphabet="ab😀\n", min_size=1, max_size=4), max_size=4))
    ids = ids_of(text)
    deltas, matched = stream(ids, stop, [], tokenizer)
    assert "".join(deltas) == cut(text, stop)
    assert (matched is None) == (cut(text, stop) == text)
    assert matched is None or text.startswith(matched, len(cut(text, stop)))


LENGTHS = st.lists(st.integers(1, 6), max_size=8)


@BOTH_WAYS
@settings(deadline=None)
@given(ids=IDS, prompt_ids=IDS, lengths=LENGTHS)
def test_tokens_may_come_in_runs(
    tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int], lengths: list[int]
) -> None:
    joined, matched, num_tokens = stream_runs(split(ids, lengths), [], prompt_ids, tokenizer)
    assert joined == BPE.decode(ids, skip_special_tokens=True)
    assert (matched, num_tokens) == (None, len(ids))


@BOTH_WAYS
@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=st.text(alphabet="ab😀\n", max_size=14), lengths=LENGTHS)
def test_a_stop_string_ends_a_run_at_the_token_that_completes_it(
    tokenizer: Tokenizer, data: st.DataObject, text: str, lengths: list[int]
) -> None:
    stop = data.draw(st.lists(st.text(alphabet="ab😀\n", min_size=1, max_size=4), max_size=4))
    ids = ids_of(text)
    singly = stream_runs([[token_id] for token_id in ids], stop, [], tokenizer)
    assert stream_runs(split(ids, lengths), stop, [], tokenizer) == singly
    deltas, matched = stream(ids, stop, [], tokenizer)
    assert singly[:2] == ("".join(deltas), matched)


@BOTH_WAYS
def test_a_run_that_ends_within_a_character_gives_out_what_comes_before_it(tokenizer: Tokenizer) -> None:
    ids = ids_of("ok😂")
    text = TextStream(Detokenizer(tokenizer), [], [])
    assert text.push(*ids[:-1]).text == "ok"
    assert text.push(ids[-1]).text == "😂"


@BOTH_WAYS
def test_a_run_of_any_length_and_any_garbage_is_taken(tokenizer: Tokenizer) -> None:
    garbage = ids_of("ÿ")[-1:] * 5000
    text = TextStream(Detokenizer(tokenizer), [], [])
    assert text.push(*garbage).text + text.finish().text == BPE.decode(garbage)
    joined, matched, num_tokens = stream_runs([[*garbage, *ids_of("abc"), *garbage]], ["b"], [], tokenizer)
    assert (joined, matched, num_tokens) == (BPE.decode(garbage) + "a", "b", 5002)


def test_a_long_answer_is_exact_whatever_its_context() -> None:
    """The window of context is cut many times over."""
    a, b, c = (id_of(FALLBACK, token) for token in ("▁a", "▁b", "c"))
    ids = [a, *fallback_bytes("é你".encode()), b, c, *fallback_bytes(b"\n")] * 40
    expected = FALLBACK.decode([a, *ids])[1:]
    assert "".join(stream(ids, [], [a], FALLBACK)[0]) == expected
    for length in (2, 3, 5, 64):
        assert stream_runs(split(ids, [length] * (len(ids) // length)), [], [a], FALLBACK)[0] == expected


@BOTH_WAYS
def test_unfinished_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = ids_of("😂")  # not in the training text: several tokens
    assert len(ids) > 1
    deltas, _ = stream(ids, [], [], tokenizer)
    assert deltas == [""] * (len(ids) - 1) + ["😂", ""]


@BOTH_WAYS
def test_unfinished_character_at_the_end_is_flushed_as_a_replacement(tokenizer: Tokenizer) -> None:
    deltas, _ = stream(ids_of("ok😂")[:-1], [], [], tokenizer)
    assert "".join(deltas) == "ok\N{REPLACEMENT CHARACTER}"


@BOTH_WAYS
def test_prompt_that_ends_within_a_character_is_not_repeated(tokenizer: Tokenizer) -> None:
    ids = ids_of("secret 😂")
    deltas, _ = stream([ids[-1], *ids_of("x")], [], ids[:-1], tokenizer)
    assert "".join(deltas) == "\N{REPLACEMENT CHARACTER}x"


@BOTH_WAYS
def test_answer_is_decoded_alone_where_the_prompt_ends_within_a_character(tokenizer: Tokenizer) -> None:
    first, second, _ = ids_of("Ⴟ")  # not in the training text: a token a byte
    ids = [second, *ids_of("x")]
    assert "".join(stream(ids, [], [first], tokenizer)[0]) == BPE.decode(ids)


@BOTH_WAYS
def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    deltas, _ = stream([*ids_of("he"), EOS, *ids_of("llo")], [], [EOS], tokenizer)
    assert "".join(deltas) == "hello"


@BOTH_WAYS
def test_text_flows_as_it_comes_without_stop_strings(tokenizer: Tokenizer) -> None:
    ids = ids_of("hello world")
    deltas, _ = stream(ids, [], [], tokenizer)
    assert deltas == [*(BPE.decode([token_id]) for token_id in ids), ""]


@BOTH_WAYS
def test_possible_beginning_of_a_stop_string_is_held_back_and_released(tokenizer: Tokenizer) -> None:
    text = TextStream(Detokenizer(tokenizer), ["xyz"], [])
    assert [text.push(token_id).text for token_id in ids_of("qxyq")] == ["q", "", "", "xyq"]
    assert text.push(*ids_of("x")).text == ""
    assert text.finish().text == "x"


@BOTH_WAYS
def test_match_at_the_same_place_names_the_longest(tokenizer: Tokenizer) -> None:
    assert stream(fallback_bytes(b"qxy"), ["x", "xy"], [], FALLBACK)[1] == "x"  # xy was not there yet
    assert stream([id_of(BPE, "hello")], ["h", "he"], [], tokenizer)[1] == "he"


@BOTH_WAYS
def test_stop_string_that_began_earlier_wins_over_one_within_it(tokenizer: Tokenizer) -> None:
    deltas, matched = stream(ids_of("qxyzr"), ["y", "xyz"], [], tokenizer)
    assert ("".join(deltas), matched) == ("q", "xyz")


@BOTH_WAYS
def test_inner_stop_string_counts_when_the_outer_one_does_not_complete(tokenizer: Tokenizer) -> None:
    deltas, matched = stream(ids_of("qxyq"), ["y", "xyz"], [], tokenizer)
    assert ("".join(deltas), matched) == ("qx", "y")


@BOTH_WAYS
def test_inner_stop_string_counts_when_the_answer_ends_within_the_outer_one(tokenizer: Tokenizer) -> None:
    deltas, matched = stream(ids_of("qxy"), ["y", "xyz"], [], tokenizer)
    assert ("".join(deltas), matched) == ("qx", "y")


@BOTH_WAYS
def test_nothing_may_follow_a_match(tokenizer: Tokenizer) -> None:
    text = TextStream(Detokenizer(tokenizer), ["x"], [])
    assert text.push(*ids_of("x")).matched_stop == "x"
    with pytest.raises(AssertionError):
        text.push(*ids_of("y"))


def test_first_word_keeps_the_space_that_joins_it_to_the_prompt() -> None:
    a, b, bos = (id_of(FALLBACK, token) for token in ("▁a", "▁b", "<bos>"))
    assert stream([b], [], [bos, a], FALLBACK)[0] == [" b", ""]
    assert stream([b], [], [bos], FALLBACK)[0] == ["b", ""]


def test_invalid_bytes_neither_stop_the_text_nor_repeat_it() -> None:
    """Byte fallback rewrites a whole run of bytes once one is invalid, text given out already included."""
    c = id_of(FALLBACK, "c")
    deltas, _ = stream([c, *fallback_bytes("你".encode() + b"\xff"), c, c], [], [], FALLBACK)
    assert "".join(deltas) == "c你\N{REPLACEMENT CHARACTER}cc"


@BOTH_WAYS
def test_endless_garbage_is_given_out_and_a_character_at_the_seam_stays_whole(tokenizer: Tokenizer) -> None:
    character = ids_of("𐍈")
    assert len(character) == 4
    for shift in range(4):
        garbage = ids_of("ÿ")[-1:] * (MAX_PENDING_TOKENS - 1 - shift)
        ids = [*garbage, *character, *ids_of("ok")]
        text = TextStream(Detokenizer(tokenizer), [], [])
        deltas = [text.push(token_id).text for token_id in ids]
        assert "".join(deltas) == BPE.decode(ids, skip_special_tokens=True)
    long = TextStream(Detokenizer(tokenizer), [], [])
    emitted = sum(len(long.push(token_id).text) for token_id in ids_of("ÿ")[-1:] * 1000)
    assert emitted >= 1000 - MAX_PENDING_TOKENS


def byte_level_with_odd_tokens() -> Tokenizer:
    """All bytes, and tokens that byte-level vocabularies hold beside pieces of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "Ġthe", "Ã©"])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<|tool call|>", "日本", "é", "<|x|>"])
    tokenizer.add_special_tokens(["<|end|>", "<|fin|>"])
    return tokenizer


ODD = byte_level_with_odd_tokens()


@settings(deadline=None, max_examples=500)
@given(ids=st.lists(st.integers(0, ODD.get_vocab_size() + 2), max_size=24), lengths=LENGTHS)
def test_bytes_of_any_kind_are_the_text_that_the_tokenizer_makes_of_them(ids: list[int], lengths: list[int]) -> None:
    joined, _, _ = stream_runs(split(ids, lengths), [], [], ODD)
    assert joined == ODD.decode(ids, skip_special_tokens=True)


def test_byte_level_tokenizers_are_followed_byte_by_byte_and_no_others() -> None:
    ways = [type(Detokenizer(tokenizer).decoder([])) for tokenizer in (BPE, ODD, BPE_IN_WINDOWS, FALLBACK)]
    assert ways == [ByteDecoder, ByteDecoder, WindowDecoder, WindowDecoder]
    assert type(Detokenizer(Tokenizer(models.BPE())).decoder([])) is WindowDecoder


def test_unknown_ids_have_no_bytes_and_are_not_kept() -> None:
    known = TokenBytes(BPE)
    assert [known[10**6 + number] for number in range(100)] == [b""] * 100 and not known
    assert known[EOS] == b"" and known[id_of(BPE, "hello")] == b"hello" and len(known) == 2


@settings(deadline=None)
@given(
    ids=st.lists(st.sampled_from([*range(5, 261), id_of(FALLBACK, "<bos>"), 2, 3]), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_special_tokens_that_are_shown_stand_between_what_is_decoded(ids: list[int], cuts: list[int]) -> None:
    marks = {id_of(FALLBACK, "<bos>"): "[MARK]"}
    bounds = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})

    def joined(runs: list[list[int]]) -> str:
        text = TextStream(Detokenizer(FALLBACK), (), (), marks)
        return "".join(text.push(*run).text for run in runs) + text.finish().text

    whole = joined([ids] if ids else [])
    assert joined([ids[start:stop] for start, stop in pairwise(bounds)]) == whole
    assert whole.count("[MARK]") == ids.count(id_of(FALLBACK, "<bos>"))


def test_a_stop_string_ends_a_text_that_shows_special_tokens_at_the_same_token() -> None:
    marks = {EOS: "<eos>"}
    ids = [*ids_of("hello "), EOS, *ids_of("world, there")]
    text = TextStream(Detokenizer(BPE), ["world"], (), marks)
    delta = text.push(*ids)
    assert (delta.text, delta.matched_stop) == ("hello <eos>", "world")
    assert delta.num_tokens < len(ids)
