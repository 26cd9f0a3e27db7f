"""Real text that every Python has on board, and a small byte-pair encoding for it."""
from __future__ import annotations

import collections
import dataclasses
import pydoc_data.topics
import re

# Words keep their leading blank, so that joining the pieces gives the text back.
_WORDS = re.compile(rb" ?[A-Za-z]+| ?[0-9]+|\n+|[ ]+|[^A-Za-z0-9\s]+|\s")

Pair = tuple[int, int]


def load_text() -> str:
    """Python's language reference, as `help()` shows it. Its wording, hence its length, differs between versions."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclasses.dataclass
class Tokenizer:
    """Byte-pair encoding: `pieces[token]` are its bytes, `merges` the pairs of tokens that became one, in order."""

    pieces: list[bytes]
    merges: dict[Pair, int]

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; bytes that did not occur in the training text are left out."""
        words = _WORDS.findall(text.encode())
        encoded = {word: self._encode_word(word) for word in set(words)}
        return [token for word in words for token in encoded[word]]

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`."""
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def _encode_word(self, word: bytes) -> list[int]:
        singles = {piece: token for token, piece in enumerate(self.pieces) if len(piece) == 1}
        tokens = [singles[word[i:i + 1]] for i in range(len(word)) if word[i:i + 1] in singles]
        while len(tokens) > 1:
            merged, pair = min((self.merges.get(pair, len(self.pieces)), pair) for pair in zip(tokens, tokens[1:]))
            if merged == len(self.pieces):
                break
            tokens = _merge(tokens, pair, merged)
        return tokens


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Starts from the bytes of `text` and merges the most frequent pair of neighbours until there are enough tokens."""
    word_counts = collections.Counter(_WORDS.findall(text.encode()))
    pieces = [bytes([byte]) for byte in sorted(set(text.encode()))]
    singles = {piece[0]: token for token, piece in enumerate(pieces)}
    words = [[singles[byte] for byte in word] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: collections.Counter[Pair] = collections.Counter()
    found_in: dict[Pair, set[int]] = collections.defaultdict(set)

    def count(word_idx: int, sign: int) -> None:
        for pair in zip(words[word_idx], words[word_idx][1:]):
            pair_counts[pair] += sign * counts[word_idx]
            found_in[pair].add(word_idx)

    for word_idx in range(len(words)):
        count(word_idx, 1)
    merges: dict[Pair, int] = {}
    while len(pieces) < vocab_size and pair_counts:
        best = max(pair_counts, key=lambda pair:
                   (pair_counts[pair], pair))  # the second: ties break the same everywhere
        if pair_counts[best] < 2:
            break
        merges[best] = len(pieces)
        pieces.append(pieces[best[0]] + pieces[best[1]])
        for word_idx in found_in.pop(best):
            count(word_idx, -1)
            words[word_idx] = _merge(words[word_idx], best, merges[best])
            count(word_idx, 1)
        del pair_counts[best]
    return Tokenizer(pieces, merges)


def _merge(tokens: list[int], pair: Pair, merged: int) -> list[int]:
    out: list[int] = []
    position = 0
    while position < len(tokens):
        is_pair = tuple(tokens[position:position + 2]) == pair
        out.append(merged if is_pair else tokens[position])
        position += 2 if is_pair else 1
    return out
