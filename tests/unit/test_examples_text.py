"""The text and the byte-pair encoding of examples/moe_lm.py."""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import text

SAMPLE = "the cat and the hat:\n\n    that = (1, 22)\tthe end"


def test_merges_the_most_frequent_pair_first() -> None:
    tokenizer = text.train_tokenizer("aab aab aab ab", vocab_size=6)
    assert tokenizer.pieces == [b" ", b"a", b"b", b"ab", b"aab", b" aab"]


def test_encoding_gives_the_text_back() -> None:
    tokenizer = text.train_tokenizer(SAMPLE, vocab_size=60)
    tokens = tokenizer.encode(SAMPLE)
    assert tokenizer.decode(tokens) == SAMPLE
    assert len(tokens) < len(SAMPLE)


def test_stops_when_no_pair_occurs_twice() -> None:
    assert len(text.train_tokenizer("abc", vocab_size=100).pieces) == 3


def test_unknown_bytes_are_left_out() -> None:
    tokenizer = text.train_tokenizer(SAMPLE, vocab_size=40)
    assert tokenizer.decode(tokenizer.encode("the zebra")) == "the ea"


def test_the_text_is_there_and_survives_the_round_trip() -> None:
    corpus = text.load_text()
    assert len(corpus) > 300_000
    tokenizer = text.train_tokenizer(corpus[:20_000], vocab_size=300)
    assert len(tokenizer.pieces) == 300
    assert tokenizer.decode(tokenizer.encode(corpus[:5_000])) == corpus[:5_000]
