"""Encodes conversations with Gemma's chat template: token ids and the loss mask.

Training, evaluation and generation all use it. The template, without its last newline:

    <bos><start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n{text}<end_of_turn>

Texts are trimmed. A system turn goes before the text of the first user turn, with a blank line
between them. Control tokens are inserted as ids, and the text between two of them is encoded
separately. So text never becomes a control id, the mask needs no search, and the ids of a prompt
are a prefix of the ids of prompt + answer.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.packing import Sample
from jaxsft.data.rows import Conversation, Turn, check_roles, with_reasoning
from jaxsft.data.tokenizer import Tokenizer

MIN_REASONING_TOKENS = 16  # a shorter reasoning, with its tag, teaches nothing

# A sentence ends at . ! ? … and closing quotes before white space, or at the end of a line.
# \u2019 \u201d are closing quotes; \u3002 \uff01 \uff1f are . ! ? in Chinese and Japanese.
_SENTENCE_END = re.compile(
    r"[.!?…][)\]\"'\u2019\u201d*]*(?=\s)|[\u3002\uff01\uff1f]|(?<=[^\s:;,])(?=\n)"
)
_DANGLING_LIST_MARK = re.compile(r"(?:^|\n)\s*(?:\d+[.)]|[-*#•]+)$")


class Piece(NamedTuple):
    """A control id, or a text that is encoded separately; and whether its tokens are labels."""

    content: int | str
    is_label: bool = False


def encode_chat(tokenizer: Tokenizer, turns: Sequence[Turn]) -> Sample:
    """Encodes a conversation that ends with an assistant turn.

    The ids start with one BOS. Labels are the tokens of every trained assistant turn and its
    <end_of_turn>.

    Raises:
      ValueError: the roles are not [system,] user, assistant, user, …, assistant.
    """
    return encode_chats(tokenizer, [turns])[0]


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Turn]], loss_on_prompt: bool = False
) -> list[Sample]:
    """`encode_chat` of each conversation, with one call of the tokenizer for all.

    With `loss_on_prompt` all tokens are labels but the BOS and untrained assistant turns.
    """
    for turns in chats:
        check_roles(turns, last="assistant")
    return _encode_pieces(tokenizer, [_render(tokenizer, turns, loss_on_prompt) for turns in chats])


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """Encodes a conversation up to the start of the next assistant turn.

    Returns:
      Ids that end with <start_of_turn>model\\n. `encode_chat` of the same turns and an answer
      starts with the same ids.

    Raises:
      ValueError: the roles are not [system,] user, assistant, …, user.
    """
    check_roles(turns, last="user")
    pieces = _render(tokenizer, turns)
    pieces += [Piece("\n"), Piece(tokenizer.start_of_turn_id), Piece("model\n")]
    return [int(token) for token in _encode_pieces(tokenizer, [pieces])[0].ids]


def _render(
    tokenizer: Tokenizer, turns: Sequence[Turn], loss_on_prompt: bool = False
) -> list[Piece]:
    pieces = [Piece(tokenizer.bos_id)]
    preface = ""
    for turn in turns:
        text = turn.content.strip()
        if turn.role == "system":
            preface = f"{text}\n\n" if text else ""
            continue
        if len(pieces) > 1:
            pieces.append(Piece("\n", loss_on_prompt))
        pieces.append(Piece(tokenizer.start_of_turn_id, loss_on_prompt))
        if turn.role == "user":
            is_label, text = loss_on_prompt, f"user\n{preface}{text}"
        else:
            is_label = turn.is_trained
            pieces.append(Piece("model\n", loss_on_prompt))
        pieces += [Piece(text, is_label), Piece(tokenizer.end_of_turn_id, is_label)]
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
    tokenizer: Tokenizer,
    chats: Sequence[tuple[Conversation, Sample]],
    max_length: int,
    template: AnswerTemplate,
) -> list[tuple[Conversation, Sample] | None]:
    """Cuts the reasoning of the last turn in each conversation, to fit `max_length` tokens.

    The start of the reasoning stays. It is cut after a sentence, or else after a word. The answer,
    the closing tags and <end_of_turn> stay. The ids of the full text tell where to cut, so nearly
    always only the closing part and the result are encoded, in one call for all conversations.

    Args:
      chats: conversations that are too long, each with its `encode_chat`.
      max_length: the most tokens that a result may have.
      template: the form of the answers.

    Returns:
      For each conversation: the shorter one and its sample, equal to its `encode_chat`. None if it
      has no reasoning, or if fewer than `MIN_REASONING_TOKENS` of it would fit.
    """
    results: list[tuple[Conversation, Sample] | None] = [None] * len(chats)
    closings = [template.closing(chat.answer or "") for chat, _ in chats]
    todo: dict[int, int] = {}  # index -> completion tokens to keep before the closing part
    for index, closing in enumerate(tokenizer.encode_many(closings)):
        if chats[index][0].reasoning is not None:
            todo[index] = max_length - chats[index][1].completion_start - len(closing) - 1
    while todo:
        shorter: dict[int, Conversation] = {}
        for index, keep in todo.items():
            if keep >= MIN_REASONING_TOKENS and (
                head := _head(tokenizer, *chats[index], keep, len(template.opening))
            ):
                shorter[index] = with_reasoning(chats[index][0], head, template)
        encoded = tokenizer.encode_many([chat.turns[-1].content for chat in shorter.values()])
        again: dict[int, int] = {}
        for (index, conversation), completion in zip(shorter.items(), encoded, strict=True):
            sample = chats[index][1]
            start = sample.completion_start
            ids = np.concatenate([sample.ids[:start], completion, sample.ids[-1:]])
            if len(ids) > max_length:  # other tokens were merged at the cut
                again[index] = todo[index] - (len(ids) - max_length)
                continue
            loss_mask = np.concatenate([sample.loss_mask[:start], np.ones(len(ids) - start, bool)])
            results[index] = conversation, Sample(ids.astype(np.int32), loss_mask)
        todo = again
    return results


def _head(
    tokenizer: Tokenizer, conversation: Conversation, sample: Sample, keep: int, open_chars: int
) -> str:
    """The part of the reasoning that is in the first `keep` tokens of the completion."""
    assert conversation.reasoning is not None
    rest = tokenizer.decode(sample.ids[sample.completion_start + keep : -1].tolist())
    if rest.startswith("\ufffd"):  # the cut split a character that is several byte tokens
        rest = "\ufffd" + rest.lstrip("\ufffd")
    limit = len(conversation.turns[-1].content) - len(rest) - open_chars
    return cut_text(conversation.reasoning, limit)


def cut_text(text: str, limit: int) -> str:
    """At most the first `limit` characters of `text`, without white space at the end.

    The cut is after the last sentence that ends in the last quarter of the limit, else after the
    last word that ends in its last half, else at the limit. A list mark that is left alone at the
    end ("3.") is removed.
    """
    if limit >= len(text):
        return text
    if limit <= 0:
        return ""
    earliest = limit - limit // 4
    # The pattern looks at the next character too, for a sentence that ends at the limit.
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
