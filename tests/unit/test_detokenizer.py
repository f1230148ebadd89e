"""Text that grows token by token equals the text of the whole, and stop strings are found as a naive search does."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import write_byte_level, write_llama_style, write_sentencepiece

from fastdeploy.frontend.detokenizer import IncrementalDetokenizer
from fastdeploy.frontend.tokenizer import load_tokenizer
from fastdeploy.sampling_params import SamplingParams

pytestmark = pytest.mark.timeout(240)

MARK = "\ufffd"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folders = [
        write_byte_level(tmp_path_factory.mktemp("bpe")),
        write_llama_style(tmp_path_factory.mktemp("llama")),
        write_sentencepiece(tmp_path_factory.mktemp("trim"), trim=True),
        write_sentencepiece(tmp_path_factory.mktemp("prefix")),
        write_sentencepiece(tmp_path_factory.mktemp("bare"), kind="bpe", dummy_prefix=False),
    ]
    return [load_tokenizer(str(folder)) for folder in folders]


@pytest.fixture(scope="module")
def byte_level(tokenizers):
    return tokenizers[0]


def cut(ids, at):
    """`ids` in pieces that begin at the places `at`."""
    bounds = sorted({0, len(ids), *(place % (len(ids) + 1) for place in at)})
    return [ids[a:b] for a, b in pairwise(bounds)]


def run(tokenizer, parts, **params):
    """All texts sent, the number of tokens taken, and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**params))
    texts, n_tokens = [], 0
    for part in parts:
        step = detokenizer.push(part)
        texts.append(step.text)
        n_tokens += step.n_tokens
        if step.stop is not None:
            break
    return [*texts, detokenizer.finish()], n_tokens, detokenizer.stopped_by


def naive(tokenizer, ids, stops, min_tokens, include):
    """Searches the whole text again at each token; characters count for the token that completes them."""
    seen = ""
    for n_tokens in range(1, len(ids) + 1):
        stream = tokenizer.text_stream()
        text = "".join(stream.feed([token_id]) for token_id in ids[:n_tokens])
        for end in range(len(seen) + 1, len(text) + 1):
            hits = [stop for stop in stops if text[:end].endswith(stop)]
            if hits and n_tokens >= min_tokens:
                hit = max(hits, key=len)
                return text[: end if include else end - len(hit)], n_tokens, hit
        seen = text
    return tokenizer.decode(ids), len(ids), None


@settings(max_examples=150, deadline=None)
@given(which=st.integers(0, 4), ids=st.lists(st.integers(0, 1003)), at=st.lists(st.integers(0, 99)), skip=st.booleans())
def test_any_cut_of_random_ids(tokenizers, which, ids, at, skip):
    texts, n_tokens, stop = run(tokenizers[which], cut(ids, at), skip_special_tokens=skip)
    assert "".join(texts) == tokenizers[which].decode(ids, skip_special_tokens=skip)
    assert (n_tokens, stop) == (len(ids), None)


@settings(max_examples=150, deadline=None)
@given(which=st.integers(0, 4), text=st.text(), at=st.lists(st.integers(0, 99)))
def test_any_cut_of_any_text(tokenizers, which, text, at):
    ids = tokenizers[which].encode(text)
    texts, _, _ = run(tokenizers[which], cut(ids, at))
    assert "".join(texts) == tokenizers[which].decode(ids)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 381)),
    at=st.lists(st.integers(0, 99)),
    stops=st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=2),
)
def test_holding_back_loses_nothing(byte_level, ids, at, stops):
    texts, _, stop = run(byte_level, cut(ids, at), stop=stops)
    if stop is None:
        assert "".join(texts) == byte_level.decode(ids)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab😀", max_size=24),
    stops=st.lists(st.text("ab😀", min_size=1, max_size=5), min_size=1, max_size=4),
    at=st.lists(st.integers(0, 99)),
    min_tokens=st.integers(0, 12),
    include=st.booleans(),
)
@example(text="aaba", stops=["abab", "b"], at=[], min_tokens=0, include=True)
def test_stops_as_the_naive_search_finds_them(byte_level, text, stops, at, min_tokens, include):
    ids = byte_level.encode(text)
    texts, n_tokens, stop = run(
        byte_level, cut(ids, at), stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include
    )
    assert ("".join(texts), n_tokens, stop) == naive(byte_level, ids, stops, min_tokens, include)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_can_begin_a_stop(byte_level, text, stops):
    detokenizer = IncrementalDetokenizer(byte_level, SamplingParams(stop=stops))
    ids, sent = byte_level.encode(text), ""
    for n_tokens, token_id in enumerate(ids, 1):
        step = detokenizer.push([token_id])
        if step.stop is not None:
            return
        sent += step.text
        seen = byte_level.decode(ids[:n_tokens])
        longest = max(n for s in stops for n in range(len(s)) if seen.endswith(s[:n]))
        assert sent == seen[: len(seen) - longest]


def test_an_ignored_stop_is_not_held_back(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, SamplingParams(stop=["STOP", "OPEN"], min_tokens=9))
    assert detokenizer.push(byte_ids(byte_level, b"xSTOP")).text == "xST"
    assert detokenizer.push(byte_ids(byte_level, b" STO")).text == "OP "


def byte_ids(tokenizer, data):
    """One token for each byte."""
    of_byte = {tokenizer.token_bytes(i): i for i in range(5, 261)}
    return [of_byte[bytes([b])] for b in data]


def test_half_a_character_is_never_sent(byte_level):
    texts, _, _ = run(byte_level, [[i] for i in byte_ids(byte_level, "a😀é".encode())])
    assert texts == ["a", "", "", "", "😀", "", "é", ""]


@pytest.mark.parametrize(
    "data", [b"\xf0\x9f\x98", b"\xf0\x9fa", b"a\xff\xfeb", b"\xed\xa0\x80", b"\xe4\xbd\xe4\xbd\xa0", b"\xc0\x80"]
)
def test_invalid_bytes_as_in_the_whole(byte_level, data):
    texts, _, _ = run(byte_level, [[i] for i in byte_ids(byte_level, data)])
    assert "".join(texts) == data.decode("utf-8", "replace")


def test_stop_across_tokens_and_pushes(byte_level):
    ids = byte_ids(byte_level, b"one ENtwo END three")
    texts, n_tokens, stop = run(byte_level, cut(ids, [5, 6, 11, 12]), stop=["END"])
    assert ("".join(texts), n_tokens, stop) == ("one ENtwo ", 13, "END")


def test_stop_in_the_middle_of_a_token(byte_level):
    word = next(i for i in range(381) if byte_level.token_bytes(i) == b" sentence")
    step = IncrementalDetokenizer(byte_level, SamplingParams(stop="ten")).push([word, word])
    assert (step.text, step.n_tokens, step.stop) == (" sen", 1, "ten")
    params = SamplingParams(stop="ten", include_stop_str_in_output=True)
    assert IncrementalDetokenizer(byte_level, params).push([word, word]).text == " senten"


def test_a_stop_before_min_tokens_is_text(byte_level):
    ids = byte_ids(byte_level, b"xSTOPySTOPz")
    texts, n_tokens, stop = run(byte_level, [ids], stop="STOP", min_tokens=6)
    assert ("".join(texts), n_tokens, stop) == ("xSTOPy", 10, "STOP")
    texts, n_tokens, _ = run(byte_level, [ids], stop="STOP", min_tokens=5)
    assert ("".join(texts), n_tokens) == ("x", 5)


def test_after_a_stop_nothing_more(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, SamplingParams(stop="b"))
    ids = byte_ids(byte_level, b"abc")
    assert detokenizer.push(ids).text == "a"
    assert (detokenizer.push(ids).text, detokenizer.push(ids).n_tokens, detokenizer.finish()) == ("", 0, "")


def test_stop_written_by_a_special_token(byte_level):
    ids = [*byte_ids(byte_level, b"hi"), 4, *byte_ids(byte_level, b"!")]
    texts, n_tokens, stop = run(byte_level, [ids], stop="<|im_end|>", skip_special_tokens=False)
    assert ("".join(texts), n_tokens, stop) == ("hi", 3, "<|im_end|>")
    texts, _, stop = run(byte_level, [ids], stop="<|im_end|>")
    assert ("".join(texts), stop) == ("hi!", None)


def test_what_was_held_back_comes_at_the_end(byte_level):
    texts, _, stop = run(byte_level, [byte_ids(byte_level, b"so EN\xf0\x9f")], stop="END")
    assert (texts, stop) == (["so ", "EN" + MARK], None)


def test_leading_space_of_sentencepiece(tokenizers):
    prefix, bare = tokenizers[3], tokenizers[4]
    for tokenizer, starts_bare in ((prefix, True), (bare, False)):
        # Which pieces a training finds depends on the library's version: take any word piece with its space.
        texts = ((i, tokenizer.token_text(i)) for i in range(tokenizer.vocab_size))
        piece, text = next((i, t) for i, t in texts if t.startswith(" ") and t[1:].isalpha())
        assert run(tokenizer, [[piece], [piece]])[0] == [text[1:] if starts_bare else text, text, ""]
