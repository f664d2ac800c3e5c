"""data/sample/: the rows that the demo trains and measures on."""

import itertools
import re
from pathlib import Path

import pytest
from support.samples import load_samples

from jaxsft.config import DataOptions
from jaxsft.data.rows import Conversation, convert_row
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
TRAIN, HELDOUT = SAMPLE / "train.jsonl", SAMPLE / "heldout.jsonl"
RUN_WORDS = 6


def rows(path: Path) -> list[dict[str, str]]:
    return [row for _, row in read_rows(path)]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def word_runs(row: dict[str, str]) -> set[tuple[str, ...]]:
    """Every run of RUN_WORDS words in the prompt and in the response."""
    runs: set[tuple[str, ...]] = set()
    for text in row.values():
        found = words(text)
        runs |= set(zip(*(found[i:] for i in range(RUN_WORDS)), strict=False))
    return runs


@pytest.mark.parametrize("path", [TRAIN, HELDOUT], ids=lambda path: path.stem)
def test_every_row_is_one_of_glaives_and_converts_without_a_note(path: Path) -> None:
    for row in rows(path):
        assert list(row) == ["prompt", "response"]
        assert re.fullmatch(
            r"<think>(?!\s).+(?<!\s)</think>\n(?!\s).+(?<!\s)", row["response"], re.S
        )
        conversation = convert_row(row)
        assert isinstance(conversation, Conversation), (row, conversation)
        assert conversation.notes == ()
        assert conversation.reasoning and conversation.answer
        # Not a restatement of one by the other.
        assert conversation.answer not in conversation.reasoning


def test_held_out_rows_share_no_text_with_training_rows() -> None:
    training = set().union(*map(word_runs, rows(TRAIN)))
    assert len(training) > 10_000
    for row in rows(HELDOUT):
        assert not word_runs(row) & training, row["prompt"]


def test_no_two_prompts_or_answers_are_alike() -> None:
    everything = rows(TRAIN) + rows(HELDOUT)
    prompts = [tuple(words(row["prompt"])) for row in everything]
    assert len(set(prompts)) == len(prompts)
    answers = [row["response"].partition("</think>")[2].strip() for row in everything]
    assert len(set(answers)) == len(answers)
    # Nearly the same prompt, with a word or two exchanged, counts as the same.
    sets = [set(prompt) for prompt in prompts]
    for a, b in itertools.combinations(sets, 2):
        assert len(a & b) <= 0.8 * len(a | b), (a, b)


@pytest.mark.parametrize(("path", "name"), [(TRAIN, "train"), (HELDOUT, "heldout")])
def test_rows_are_short_and_the_card_has_their_number(
    path: Path, name: str, tokenizer: Tokenizer
) -> None:
    samples, report = load_samples(path, tokenizer, DataOptions(max_length=512, overlong="raise"))
    assert report.samples == report.rows_read == len(samples) and not report.noted
    lengths = [len(sample.ids) for sample in samples]
    card = (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}.jsonl` | {len(samples)} |" in card
    assert max(lengths) < 320
    if name == "train":
        assert f"{report.num_tokens:,} tokens" in card
        assert f"{report.num_loss_tokens:,} of them completion" in card
