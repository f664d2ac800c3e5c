"""Filters against conversations that hurt training: duplicates, test questions, bad answers.

A filter looks at the text only. It returns why a conversation is left out, or None:

    duplicate     an earlier conversation has exactly the same turns
    contaminated  the prompt is a held-out prompt, or shares runs of 8 words or marks with one: at
                  least half of those that no other held-out prompt has (GPT-3, arXiv 2005.14165,
                  appendix C, compares runs of words too)
    degenerate    a trained reasoning or answer ends in a loop (loops.py); or every trained answer
                  is only a phrase such as "I hope this helps!"
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable

from jaxsft.data.loops import find_loop
from jaxsft.data.rows import Conversation, Rejected

Filter = Callable[[Conversation], Rejected | None]

_RUN_WORDS = 8
_FILLERS = frozenset(
    {
        "i hope this helps",
        "i hope this helps let me know if you have any questions",
        "hope this helps",
        "i hope that helps",
        "hope that helps",
        "let me know if you have any questions",
        "let me know if you need anything else",
        "feel free to ask",
        "is there anything else i can help you with",
        "sure",
        "of course",
        "certainly",
        "done",
        "ok",
        "okay",
        "here you go",
        "thank you",
    }
)
_TAG = re.compile(r"</?\w+>")
_WORD = re.compile(r"\w+")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def degenerate(conversation: Conversation) -> Rejected | None:
    """Rejects trained texts that end in a loop, and conversations whose answers say nothing."""
    *earlier, last = [
        turn.content for turn in conversation.turns if turn.role == "assistant" and turn.is_trained
    ]
    answer = conversation.answer or last
    if all(" ".join(_words(text)) in _FILLERS for text in (answer, *earlier)):
        return Rejected("degenerate", f'the answer is only "{answer.strip()}"')
    texts = [("reasoning", conversation.reasoning or ""), ("answer", answer)]
    texts += [("earlier answer", part) for text in earlier for part in _TAG.split(text)]
    for name, text in texts:
        if loop := find_loop(text):
            unit = loop.unit.strip()[:60]
            return Rejected("degenerate", f'the {name} ends in a loop: {loop.times} x "{unit}"')
    return None


def duplicates() -> Filter:
    """A filter that rejects repeated conversations. It keeps 16 bytes of BLAKE2b for each."""
    seen: set[bytes] = set()

    def filter_(conversation: Conversation) -> Rejected | None:
        digest = hashlib.blake2b(digest_size=16)
        for turn in conversation.turns:
            digest.update(f"{turn.role}\0{turn.content}\0{turn.is_trained}\0".encode())
        key = digest.digest()
        if key in seen:
            return Rejected("duplicate", "the same conversation came before")
        seen.add(key)
        return None

    return filter_


def contaminated(heldout: Iterable[Conversation]) -> Filter:
    """A filter that rejects conversations with the prompt of a held-out one."""
    prompts = [_prompt(conversation) for conversation in heldout]
    whole = {" ".join(prompt.split()): i for i, prompt in enumerate(prompts)}
    runs = [_runs(prompt) for prompt in prompts]
    shared = Counter(run for of_prompt in runs for run in of_prompt)
    # Runs that several prompts share, such as instructions, do not count.
    own = [{run for run in of_prompt if shared[run] == 1} for of_prompt in runs]
    prompt_with = {run: i for i, of_prompt in enumerate(own) for run in of_prompt}

    def filter_(conversation: Conversation) -> Rejected | None:
        prompt = _prompt(conversation)
        found = whole.get(" ".join(prompt.split()))
        if found is None:
            counts = Counter(prompt_with[run] for run in _runs(prompt) if run in prompt_with)
            found = next((i for i, count in counts.items() if 2 * count >= len(own[i])), None)
        if found is None:
            return None
        return Rejected("contaminated", f"the prompt of held-out sample {found + 1}")

    return filter_


def _prompt(conversation: Conversation) -> str:
    return " ".join(turn.content for turn in conversation.turns if turn.role == "user").lower()


def _runs(prompt: str) -> set[tuple[str, ...]]:
    """All runs of 8 words or marks; none if the text has fewer."""
    words = _WORD_OR_MARK.findall(prompt)
    return {tuple(words[i : i + _RUN_WORDS]) for i in range(len(words) - _RUN_WORDS + 1)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
