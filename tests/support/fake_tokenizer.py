"""A tokenizer small enough to read: the interface of data/tokenizer.py without its vocabulary."""

import re
from collections.abc import Iterable, Sequence

_PIECES = re.compile(r"[A-Za-z]{1,4}|\d|\s|.", re.DOTALL)


class FakeTokenizer:
    """Runs of up to four ASCII letters are tokens, other characters are their UTF-8 bytes.

    As in the real one, no text gives an id below 256 + 5 that is a control id, and ids cut inside a
    character decode to U+FFFD. `calls` counts the texts that were encoded.
    """

    pad_id, eos_id, bos_id, start_of_turn_id, end_of_turn_id = range(256, 261)
    stop_ids = (eos_id, end_of_turn_id)
    digest = "fake"

    def __init__(self) -> None:
        self._words: list[str] = []
        self._ids: dict[str, int] = {}
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            if len(piece) == 1:
                ids += piece.encode()
                continue
            if piece not in self._ids:
                self._ids[piece] = 261 + len(self._words)
                self._words.append(piece)
            ids.append(self._ids[piece])
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        names = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
        data = b""
        for token in ids:
            if token < 256:
                data += bytes([token])
            elif token >= 261 or not skip_special:
                data += (names[token - 256] if token < 261 else self._words[token - 261]).encode()
        return data.decode("utf-8", errors="replace")
