"""Turns -> token ids and loss mask: the one path for training, evaluation and generation.

Gemma's template, without its last newline:

    <bos><start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n{text}<end_of_turn>

Texts are trimmed; a system turn goes in front of the first user turn, with a blank line between.
Control tokens are put in as ids and every text between two of them is encoded on its own, so text
never yields a control id, the mask is known without searching, and a prompt is exactly the prefix
of prompt + answer.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsft.data.packing import Sample
from jaxsft.data.rows import Conversation, Turn, check_roles, completion_text, with_reasoning
from jaxsft.data.tokenizer import Tokenizer

MIN_REASONING_TOKENS = 16  # below this a shortened reasoning, its tag included, teaches nothing
_OPEN_CHARS = len("<reasoning>")

# A sentence ends at its mark (closing quotes included) before white space, or at a line's end.
# \u2019 \u201d are closing quotes; \u3002 \uff01 \uff1f are . ! ? in Chinese and Japanese.
_SENTENCE_END = re.compile(
    r"[.!?…][)\]\"'\u2019\u201d*]*(?=\s)|[\u3002\uff01\uff1f]|(?<=[^\s:;,])(?=\n)"
)
_DANGLING_LIST_MARK = re.compile(r"(?:^|\n)\s*(?:\d+[.)]|[-*#•]+)$")


class Piece(NamedTuple):
    """A control id or a text to encode on its own, and whether its tokens are labels."""

    content: int | str
    is_label: bool = False


def encode_chat(tokenizer: Tokenizer, turns: Sequence[Turn]) -> Sample:
    """Encodes a conversation that ends with an assistant turn.

    One BOS; the tokens of every assistant turn and its <end_of_turn> are labels, no others.

    Raises:
      ValueError: the roles are not [system,] user, assistant, user, …, assistant.
    """
    return encode_chats(tokenizer, [turns])[0]


def encode_chats(tokenizer: Tokenizer, chats: Sequence[Sequence[Turn]]) -> list[Sample]:
    """`encode_chat` of each conversation, with one bulk call of the tokenizer."""
    for turns in chats:
        check_roles(turns, last="assistant")
    return _encode_pieces(tokenizer, [_render(tokenizer, turns) for turns in chats])


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """Encodes a conversation up to where the next assistant turn begins.

    Returns:
      Ids that end with <start_of_turn>model\\n; `encode_chat` of the same turns and an answer
      starts with exactly these.

    Raises:
      ValueError: the roles are not [system,] user, assistant, …, user.
    """
    check_roles(turns, last="user")
    pieces = _render(tokenizer, turns)
    pieces += [Piece("\n"), Piece(tokenizer.start_of_turn_id), Piece("model\n")]
    return [int(token) for token in _encode_pieces(tokenizer, [pieces])[0].ids]


def _render(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[Piece]:
    pieces = [Piece(tokenizer.bos_id)]
    preface = ""
    for turn in turns:
        text = turn.content.strip()
        if turn.role == "system":
            preface = f"{text}\n\n" if text else ""
            continue
        if len(pieces) > 1:
            pieces.append(Piece("\n"))
        pieces.append(Piece(tokenizer.start_of_turn_id))
        if turn.role == "user":
            pieces += [Piece(f"user\n{preface}{text}"), Piece(tokenizer.end_of_turn_id)]
        else:
            pieces += [Piece("model\n"), Piece(text, True), Piece(tokenizer.end_of_turn_id, True)]
        preface = ""
    return pieces


def _encode_pieces(tokenizer: Tokenizer, chats: Sequence[Sequence[Piece]]) -> list[Sample]:
    texts = [piece.content for chat in chats for piece in chat if isinstance(piece.content, str)]
    encoded = iter(tokenizer.encode_many(texts))
    samples = []
    for chat in chats:
        ids: list[int] = []
        loss_mask: list[bool] = []
        for piece in chat:
            tokens = [piece.content] if isinstance(piece.content, int) else next(encoded)
            ids += tokens
            loss_mask += [piece.is_label] * len(tokens)
        samples.append(Sample(np.array(ids, np.int32), np.array(loss_mask, bool)))
    return samples


def shorten(
    tokenizer: Tokenizer, chats: Sequence[tuple[Conversation, Sample]], max_length: int
) -> list[tuple[Conversation, Sample] | None]:
    """Cuts the last turn's reasoning in each conversation so that it fits `max_length` tokens.

    The reasoning keeps its head, cut after a sentence or else a word; answer, closing tags and
    <end_of_turn> stay. The ids of the full text say how far the head reaches, so that, in nearly
    every case, only the closing part and the result are encoded, for all conversations together.

    Args:
      chats: conversations, each with `encode_chat` of its turns, which is too long.
      max_length: tokens allowed.

    Returns:
      For each the shorter conversation and its sample, exactly `encode_chat` of it; None where
      there is no reasoning, or no room for `MIN_REASONING_TOKENS` of it.
    """
    results: list[tuple[Conversation, Sample] | None] = [None] * len(chats)
    closings = [completion_text("", chat.answer or "")[_OPEN_CHARS:] for chat, _ in chats]
    todo: dict[int, int] = {}  # index -> completion tokens to keep in front of the closing part
    for index, closing in enumerate(tokenizer.encode_many(closings)):
        if chats[index][0].reasoning is not None:
            todo[index] = max_length - chats[index][1].completion_start - len(closing) - 1
    while todo:
        shorter: dict[int, Conversation] = {}
        for index, keep in todo.items():
            if keep >= MIN_REASONING_TOKENS and (head := _head(tokenizer, *chats[index], keep)):
                shorter[index] = with_reasoning(chats[index][0], head)
        encoded = tokenizer.encode_many([chat.turns[-1].content for chat in shorter.values()])
        again: dict[int, int] = {}
        for (index, conversation), completion in zip(shorter.items(), encoded, strict=True):
            sample = chats[index][1]
            start = sample.completion_start
            ids = np.concatenate([sample.ids[:start], completion, sample.ids[-1:]])
            if len(ids) > max_length:  # the tokens next to the cut merged in another way
                again[index] = todo[index] - (len(ids) - max_length)
                continue
            loss_mask = np.concatenate([sample.loss_mask[:start], np.ones(len(ids) - start, bool)])
            results[index] = conversation, Sample(ids.astype(np.int32), loss_mask)
        todo = again
    return results


def _head(tokenizer: Tokenizer, conversation: Conversation, sample: Sample, keep: int) -> str:
    """The reasoning's head within the first `keep` tokens of the completion."""
    assert conversation.reasoning is not None
    rest = tokenizer.decode(sample.ids[sample.completion_start + keep : -1].tolist())
    if rest.startswith("\ufffd"):  # one character of several byte tokens, cut in two
        rest = "\ufffd" + rest.lstrip("\ufffd")
    limit = len(conversation.turns[-1].content) - len(rest) - _OPEN_CHARS
    return cut_text(conversation.reasoning, limit)


def cut_text(text: str, limit: int) -> str:
    """At most the first `limit` characters, cut after a sentence, else a word, else anywhere.

    A sentence's end counts in the last quarter of the limit, a word's in the last half, so that no
    more is lost than that. A list mark left alone at the end ("3.") goes too; the result has no
    white space at its end.
    """
    if limit >= len(text):
        return text
    if limit <= 0:
        return ""
    earliest = limit - limit // 4
    # One character more, so that a sentence that ends exactly at the limit is seen to end.
    matches = _SENTENCE_END.finditer(text, earliest - 1, limit + 1)
    ends = [match.end() for match in matches if earliest <= match.end() <= limit]
    if ends:
        head = text[: ends[-1]]
    else:
        head = text[:limit]
        if not head[-1].isspace() and not text[limit].isspace():
            words = (head.rsplit(None, 1) or [""])[0]
            head = words if len(words) > limit // 2 else head
    return _DANGLING_LIST_MARK.sub("", head.rstrip()).rstrip()
