r"""Byte-level BPE of many texts at once: the ids of `tokenizers`, several times as fast on one core.

Byte-level BPE (GPT-2: Radford et al. 2019, section 2.2) first cuts a text into words by a regular expression and then
encodes each word by itself, so equal words have equal ids. Words repeat: here a batch is cut with array operations on
its bytes, each distinct word is encoded once, by `tokenizers`, and the rest are look-ups.

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

The arrays know the classes of ASCII only. A word always begins where white space follows something else, whatever is
left and right of it: from one such place to the next a stretch that holds any other byte goes to `tokenizers` as a
whole. Tokenizers of another kind are asked for every text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from fednested_lib.text import end_of_text_id, load_tokenizer

LETTER, DIGIT, OTHER, FOREIGN, END, WHITE, SPACE = range(7)
MAX_WORDS = 1 << 20  # about 150 MB
_SLOT_BITS = 21
_PIECE_CHARS = 1 << 20  # so that the arrays of a piece stay in the cache
_KEY_BYTES = 8
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)  # odd: multiplication loses nothing
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(_KEY_BYTES + 1)], dtype=np.uint64)
_APOSTROPHE = ord("'")
_ONE_LETTER = np.isin(np.arange(256), list(b"stmd"))
_TWO_LETTERS = np.array([first | second << 8 for first, second in (b"ll", b"ve", b"re")], dtype=np.uint16)


def _classes() -> bytes:
    """Return the class of each byte; NUL is foreign because it pads the keys, UTF-8 never has the byte of END."""
    table = np.full(256, OTHER, dtype=np.uint8)
    table[[0, *range(128, 255)]] = FOREIGN
    table[255] = END
    table[list(b"\t\n\v\f\r")] = WHITE
    table[ord(" ")] = SPACE
    for first, last, of in (("a", "z", LETTER), ("A", "Z", LETTER), ("0", "9", DIGIT)):
        table[ord(first) : ord(last) + 1] = of
    return table.tobytes()


_CLASS = _classes()


class FastEncoder:
    """Encodes batches of texts into one token stream.

    Args:
        tokenizer: Bytes of ``tokenizer.json``.

    Raises:
        SnapshotError: They are no tokenizer, or it has no end-of-text token.
    """

    def __init__(self, tokenizer: bytes) -> None:
        self._tokenizer = load_tokenizer(tokenizer)
        self.end = end_of_text_id(self._tokenizer)
        description = json.loads(tokenizer)
        self._added = [token["content"].encode("utf-8") for token in description.get("added_tokens") or []]
        self._known = _Words(self.end) if _cuts_into_words(description) else None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return int32 [n]: the ids of each text, the end-of-text id after each.

        Special tokens are not added; one that a text spells out is that token, as in `tokenizers`.
        """
        pieces = [np.empty(0, dtype=np.int32)]
        pieces += [self._encoded(each) if self._fits(each) else self._asked(each) for each in _pieces(texts)]
        return np.concatenate(pieces)

    def _fits(self, texts: Sequence[str]) -> bool:
        # One huge text, the last of its piece, may have more distinct words than the table has slots.
        return self._known is not None and len(texts[-1]) <= _PIECE_CHARS

    def _encoded(self, texts: Sequence[str]) -> np.ndarray:
        joined = b"".join([b"\xff", *chain.from_iterable((text.encode("utf-8"), b"\xff") for text in texts)])
        if not any(token in joined for token in self._added):
            return self._looked_up(joined)
        if len(texts) == 1:
            return self._asked(texts)
        middle = len(texts) // 2
        return np.concatenate([self._encoded(texts[:middle]), self._encoded(texts[middle:])])

    def _asked(self, texts: Sequence[str]) -> np.ndarray:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.fromiter(chain.from_iterable([*one.ids, self.end] for one in encodings), dtype=np.int32)

    def _looked_up(self, joined: bytes) -> np.ndarray:
        known = self._known
        if len(known) >= MAX_WORDS:
            known.clear()
        data = np.frombuffer(joined + bytes(2 * _KEY_BYTES), dtype=np.uint8)
        starts, odd = _cut(joined)
        lengths = np.diff(starts, append=len(joined))
        # A stretch with foreign bytes and a long word have no key of fixed size: they are found by their bytes.
        odd |= lengths > 2 * _KEY_BYTES
        keys = _keys(data, starts, lengths)
        words = known.find(keys)
        words[odd] = self._by_bytes(_spans(joined, starts[odd], lengths[odd]))
        while (unknown := np.flatnonzero(words < 0)).size:
            # Distinct by hash: of two keys with one hash the second is still unknown in the next round.
            at = unknown[np.unique(_mixed(keys[:, unknown]), return_index=True)[1]]
            known.put(keys[:, at], self._numbers_of(_spans(joined, starts[at], lengths[at])))
            words[unknown] = known.find(keys[:, unknown])
        return known.ids(words[1:])  # without the mark before the first text

    def _by_bytes(self, found: Sequence[bytes]) -> list[int]:
        number_of = self._known.number_of
        new = [word for word in dict.fromkeys(found) if word not in number_of]
        number_of.update(zip(new, self._numbers_of(new).tolist(), strict=True))
        return [number_of[word] for word in found]

    def _numbers_of(self, new: Sequence[bytes]) -> np.ndarray:
        texts = [word.decode("utf-8") for word in new]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return self._known.add([one.ids for one in encodings])


class _Words:
    """Distinct words and their ids; a word's number is its place in them.

    Words of at most 16 bytes are found by a hash table with linear probing, made of arrays, that is asked for many at
    once; word 0 is the end of a text.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self.clear()

    def clear(self) -> None:
        self.number_of: dict[bytes, int] = {}
        self._keys = np.zeros((2, 1 << _SLOT_BITS), dtype=np.uint64)
        self._numbers = np.full(1 << _SLOT_BITS, -1, dtype=np.int32)
        self._ids, self._begins, self._counts = _Grown(np.int32), _Grown(np.int64), _Grown(np.int64)
        self.add([[self._end]])
        mark = np.frombuffer(b"\xff".ljust(2 * _KEY_BYTES, b"\0"), dtype=np.uint64).reshape(2, 1)
        self.put(mark, np.zeros(1, dtype=np.int32))

    def __len__(self) -> int:
        return self._counts.n

    def add(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Append words by their ids; return their numbers."""
        first, counts = len(self), np.array([len(one) for one in ids], dtype=np.int64)
        self._begins.append(self._ids.n + np.cumsum(counts) - counts)
        self._counts.append(counts)
        self._ids.append(np.fromiter(chain.from_iterable(ids), dtype=np.int32))
        return np.arange(first, len(self), dtype=np.int32)

    def ids(self, words: np.ndarray) -> np.ndarray:
        """Return the ids of words by their numbers, concatenated."""
        counts = self._counts.values[words]
        ends = np.cumsum(counts)
        return self._ids.values[np.repeat(self._begins.values[words] - ends + counts, counts) + np.arange(ends[-1])]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of the words with these keys, −1 where unknown."""
        slots = _slots(keys)
        words = self._numbers[slots]
        wrong = np.flatnonzero((words >= 0) & self._differ(slots, keys))
        while wrong.size:  # another word sits in the slot: its own may be further on
            slots[wrong] = (slots[wrong] + 1) % len(self._numbers)
            words[wrong] = self._numbers[slots[wrong]]
            wrong = wrong[(words[wrong] >= 0) & self._differ(slots[wrong], keys[:, wrong])]
        return words

    def put(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Enter distinct keys that are not in the table."""
        slots, left = _slots(keys), np.arange(len(numbers))
        while left.size:
            free = left[self._numbers[slots[left]] < 0]
            one = free[np.unique(slots[free], return_index=True)[1]]  # of several that want a slot
            self._keys[:, slots[one]], self._numbers[slots[one]] = keys[:, one], numbers[one]
            left = left[self._numbers[slots[left]] != numbers[left]]
            slots[left] = (slots[left] + 1) % len(self._numbers)

    def _differ(self, slots: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return (self._keys[0][slots] != keys[0]) | (self._keys[1][slots] != keys[1])


class _Grown:
    """An array that grows: `values` has room beyond its first n."""

    def __init__(self, dtype: type) -> None:
        self.values, self.n = np.empty(1024, dtype=dtype), 0

    def append(self, more: np.ndarray) -> None:
        end = self.n + len(more)
        if end > len(self.values):
            self.values = np.concatenate([self.values[: self.n], np.empty(end, dtype=self.values.dtype)])
        self.values[self.n : end] = more
        self.n = end


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    begin, size = 0, 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= _PIECE_CHARS or end == len(texts):
            yield texts[begin:end]
            begin, size = end, 0


def _keys(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return uint64 [2, n]: the first 16 bytes of words, zeros after their end."""
    eights = np.ndarray((len(data) - _KEY_BYTES + 1,), dtype="<u8", buffer=data, strides=(1,))
    keys = np.zeros((2, len(starts)), dtype=np.uint64)
    keys[0] = eights[starts] & _MASKS[np.minimum(lengths, _KEY_BYTES)]
    long = np.flatnonzero(lengths > _KEY_BYTES)
    keys[1, long] = eights[starts[long] + _KEY_BYTES] & _MASKS[np.minimum(lengths[long] - _KEY_BYTES, _KEY_BYTES)]
    return keys


def _mixed(keys: np.ndarray) -> np.ndarray:
    mixed = (keys[0] ^ (keys[1] * _MIX[1])) * _MIX[0]
    return (mixed ^ (mixed >> np.uint64(32))) * _MIX[1]


def _slots(keys: np.ndarray) -> np.ndarray:
    return (_mixed(keys) >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)


def _spans(joined: bytes, starts: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    ends = (starts + lengths).tolist()
    return [joined[begin:end] for begin, end in zip(starts.tolist(), ends, strict=True)]


def _cut(joined: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return where words begin in texts that 0xFF precedes and follows, and which of them hold foreign bytes."""
    of = np.frombuffer(joined.translate(_CLASS), dtype=np.uint8)
    before, here, after = of[:-2], of[1:-1], of[2:]
    begins = np.ones(len(of), dtype=bool)
    # White space begins a word after something else, and again where it is the last before something else.
    white = (before < WHITE) | (after < END)
    # A space belongs to what follows it.
    other = ((here != before) & (before != SPACE)) | (here == END)
    np.copyto(begins[1:-1], np.where(here >= WHITE, white, other))
    _cut_contractions(np.frombuffer(joined, dtype=np.uint8), begins)
    odd = _join_foreign(of, begins)
    starts = np.flatnonzero(begins)
    return starts, odd[starts]


def _join_foreign(of: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Let each stretch with foreign bytes be one word; return where those begin."""
    odd, foreign = np.zeros(len(of), dtype=bool), np.flatnonzero(of == FOREIGN)
    if not foreign.size:
        return odd
    # White space after a known byte that is none, and both sides of the end of a text.
    ends, before = of == END, np.append(np.uint8(END), of[:-1])
    sure = np.flatnonzero(ends | (before == END) | ((of >= WHITE) & (before <= OTHER)))
    first = np.unique(np.searchsorted(sure, foreign, side="right") - 1)
    for begin, end in zip(sure[first].tolist(), sure[first + 1].tolist(), strict=True):
        begins[begin + 1 : end] = False
    odd[sure[first]] = True
    return odd


def _cut_contractions(data: np.ndarray, begins: np.ndarray) -> None:
    """Let 's, 't, 're, 've, 'm, 'll, 'd be words where a word begins with an apostrophe."""
    at = np.flatnonzero((data == _APOSTROPHE) & begins)
    at = at[at + 2 < len(data)]
    pairs = data[at + 1].astype(np.uint16) | data[at + 2].astype(np.uint16) << 8
    for length, found in ((2, at[_ONE_LETTER[data[at + 1]]]), (3, at[np.isin(pairs, _TWO_LETTERS)])):
        begins[found + 1] = False
        begins[found + length] = True


def _cuts_into_words(description: dict) -> bool:
    """Return whether the tokenizer is byte-level BPE with the expression above; NFC leaves ASCII as it is."""
    cut, model = description.get("pre_tokenizer") or {}, description["model"]
    normalizer = (description.get("normalizer") or {}).get("type")
    added = "".join(token["content"] for token in description.get("added_tokens") or [])
    return (
        cut.get("type") == "ByteLevel"
        and not cut.get("add_prefix_space")
        and cut.get("use_regex", True)
        and (normalizer is None or (normalizer == "NFC" and added.isascii()))
        and model.get("type") == "BPE"
        and not model.get("dropout")
    )
