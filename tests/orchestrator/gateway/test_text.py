import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from orchestrator.gateway.text import MAX_PENDING_TOKENS, TextStream

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


BPE = train_byte_level()
FALLBACK = make_byte_fallback()


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
    ids: list[int], stop: list[str], prompt_ids: list[int], tokenizer: Tokenizer = BPE
) -> tuple[list[str], str | None]:
    """The text of each delta, and the stop string that ended the answer."""
    text = TextStream(tokenizer, stop, prompt_ids)
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
    runs: list[list[int]], stop: list[str], prompt_ids: list[int], tokenizer: Tokenizer = BPE
) -> tuple[str, str | None, int]:
    """As ``stream`` with tokens in runs: the whole text, the stop string, and how many tokens belong to the answer."""
    text, joined, num_tokens = TextStream(tokenizer, stop, prompt_ids), "", 0
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


@settings(deadline=None)
@given(ids=IDS, prompt_ids=IDS)
def test_deltas_joined_are_the_decoded_text(ids: list[int], prompt_ids: list[int]) -> None:
    deltas, matched = stream(ids, [], prompt_ids)
    assert "".join(deltas) == BPE.decode(ids, skip_special_tokens=True)
    assert matched is None


@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=st.text(alphabet="ab😀\n", max_size=14))
def test_text_ends_before_the_first_stop_string(data: st.DataObject, text: str) -> None:
    stop = data.draw(st.lists(st.text(alphabet="ab😀\n", min_size=1, max_size=4), max_size=4))
    ids = ids_of(text)
    deltas, matched = stream(ids, stop, [])
    assert "".join(deltas) == cut(text, stop)
    assert (matched is None) == (cut(text, stop) == text)
    assert matched is None or text.startswith(matched, len(cut(text, stop)))


LENGTHS = st.lists(st.integers(1, 6), max_size=8)


@settings(deadline=None)
@given(ids=IDS, prompt_ids=IDS, lengths=LENGTHS)
def test_tokens_may_come_in_runs(ids: list[int], prompt_ids: list[int], lengths: list[int]) -> None:
    joined, matched, num_tokens = stream_runs(split(ids, lengths), [], prompt_ids)
    assert joined == BPE.decode(ids, skip_special_tokens=True)
    assert (matched, num_tokens) == (None, len(ids))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=st.text(alphabet="ab😀\n", max_size=14), lengths=LENGTHS)
def test_a_stop_string_ends_a_run_at_the_token_that_completes_it(
    data: st.DataObject, text: str, lengths: list[int]
) -> None:
    stop = data.draw(st.lists(st.text(alphabet="ab😀\n", min_size=1, max_size=4), max_size=4))
    ids = ids_of(text)
    singly = stream_runs([[token_id] for token_id in ids], stop, [])
    assert stream_runs(split(ids, lengths), stop, []) == singly
    deltas, matched = stream(ids, stop, [])
    assert singly[:2] == ("".join(deltas), matched)


def test_a_run_that_ends_within_a_character_gives_out_what_comes_before_it() -> None:
    ids = ids_of("ok😂")
    text = TextStream(BPE, [], [])
    assert text.push(*ids[:-1]).text == "ok"
    assert text.push(ids[-1]).text == "😂"


def test_a_run_of_any_length_and_any_garbage_is_taken() -> None:
    garbage = ids_of("ÿ")[-1:] * 5000
    text = TextStream(BPE, [], [])
    assert text.push(*garbage).text + text.finish().text == BPE.decode(garbage)
    joined, matched, num_tokens = stream_runs([[*garbage, *ids_of("abc"), *garbage]], ["b"], [])
    assert (joined, matched, num_tokens) == (BPE.decode(garbage) + "a", "b", 5002)


def test_a_long_answer_is_exact_whatever_its_context() -> None:
    """The window of context is cut many times over."""
    a, b, c = (id_of(FALLBACK, token) for token in ("▁a", "▁b", "c"))
    ids = [a, *fallback_bytes("é你".encode()), b, c, *fallback_bytes(b"\n")] * 40
    expected = FALLBACK.decode([a, *ids])[1:]
    assert "".join(stream(ids, [], [a], FALLBACK)[0]) == expected
    for length in (2, 3, 5, 64):
        assert stream_runs(split(ids, [length] * (len(ids) // length)), [], [a], FALLBACK)[0] == expected


def test_unfinished_character_waits_for_its_last_byte() -> None:
    ids = ids_of("😂")  # not in the training text: several tokens
    assert len(ids) > 1
    deltas, _ = stream(ids, [], [])
    assert deltas == [""] * (len(ids) - 1) + ["😂", ""]


def test_unfinished_character_at_the_end_is_flushed_as_a_replacement() -> None:
    deltas, _ = stream(ids_of("ok😂")[:-1], [], [])
    assert "".join(deltas) == "ok\N{REPLACEMENT CHARACTER}"


def test_prompt_that_ends_within_a_character_is_not_repeated() -> None:
    ids = ids_of("secret 😂")
    deltas, _ = stream([ids[-1], *ids_of("x")], [], ids[:-1])
    assert "".join(deltas) == "\N{REPLACEMENT CHARACTER}x"


def test_answer_is_decoded_alone_where_the_prompt_ends_within_a_character() -> None:
    first, second, _ = ids_of("Ⴟ")  # not in the training text: a token a byte
    ids = [second, *ids_of("x")]
    assert "".join(stream(ids, [], [first])[0]) == BPE.decode(ids)


def test_special_tokens_give_no_text() -> None:
    deltas, _ = stream([*ids_of("he"), EOS, *ids_of("llo")], [], [EOS])
    assert "".join(deltas) == "hello"


def test_text_flows_as_it_comes_without_stop_strings() -> None:
    ids = ids_of("hello world")
    deltas, _ = stream(ids, [], [])
    assert deltas == [*(BPE.decode([token_id]) for token_id in ids), ""]


def test_possible_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    text = TextStream(BPE, ["xyz"], [])
    assert [text.push(token_id).text for token_id in ids_of("qxyq")] == ["q", "", "", "xyq"]
    assert text.push(*ids_of("x")).text == ""
    assert text.finish().text == "x"


def test_match_at_the_same_place_names_the_longest() -> None:
    assert stream(fallback_bytes(b"qxy"), ["x", "xy"], [], FALLBACK)[1] == "x"  # xy was not there yet
    assert stream([id_of(BPE, "hello")], ["h", "he"], [])[1] == "he"


def test_stop_string_that_began_earlier_wins_over_one_within_it() -> None:
    deltas, matched = stream(ids_of("qxyzr"), ["y", "xyz"], [])
    assert ("".join(deltas), matched) == ("q", "xyz")


def test_inner_stop_string_counts_when_the_outer_one_does_not_complete() -> None:
    deltas, matched = stream(ids_of("qxyq"), ["y", "xyz"], [])
    assert ("".join(deltas), matched) == ("qx", "y")


def test_inner_stop_string_counts_when_the_answer_ends_within_the_outer_one() -> None:
    deltas, matched = stream(ids_of("qxy"), ["y", "xyz"], [])
    assert ("".join(deltas), matched) == ("qx", "y")


def test_nothing_may_follow_a_match() -> None:
    text = TextStream(BPE, ["x"], [])
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


def test_endless_garbage_is_given_out_and_a_character_at_the_seam_stays_whole() -> None:
    character = ids_of("𐍈")
    assert len(character) == 4
    for shift in range(4):
        garbage = ids_of("ÿ")[-1:] * (MAX_PENDING_TOKENS - 1 - shift)
        ids = [*garbage, *character, *ids_of("ok")]
        text = TextStream(BPE, [], [])
        deltas = [text.push(token_id).text for token_id in ids]
        assert "".join(deltas) == BPE.decode(ids, skip_special_tokens=True)
    long = TextStream(BPE, [], [])
    emitted = sum(len(long.push(token_id).text) for token_id in ids_of("ÿ")[-1:] * 1000)
    assert emitted >= 1000 - MAX_PENDING_TOKENS
