"""Counts and checks all samples of a prepared set.

NumPy works on slices of the mapped arrays: hundreds of millions of tokens take seconds, and the
memory of one slice. The template of a sample is (data/chat.py)

    <bos> (<start_of_turn> … <end_of_turn>  of the user, then the same of the model) one or more
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxsft.common.batch import BoolArray, Int32Array
from jaxsft.common.text import plural, visible_line, visible_text
from jaxsft.config import ANSWER_TEMPLATE
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.prepared import Prepared, source_of
from jaxsft.data.tokenizer import Tokenizer

PERCENTILES = (1, 5, 10, 50, 90, 95, 99)

_SLICE_TOKENS = 1 << 22  # 21 MB of tokens and mask, and three times that during the checks
_NUM_EXAMPLES = 5  # kept of each check
_CONTROLS_PER_EXCHANGE = 4  # a user turn and a model turn, each with its begin and its end
_POLICIES = {
    "without_thought": {
        "reject": "rows with such an answer are left out",
        "keep_plain": "such answers are trained with the system text",
        "drop_system": "such answers are trained without the system text",
    },
    "earlier_reasoning": {
        "keep": "every turn is trained, and later ones see its reasoning",
        "strip": "only the last turn is trained, and sees no earlier reasoning",
    },
}
_FILTERS = {"duplicate": "drop_duplicates", "contaminated": "drop_contaminated"}

IndexArray = npt.NDArray[np.int64]


class SampleCheck(NamedTuple):
    """A condition that must hold for each sample, and the first few samples that break it."""

    name: str
    num_failed: int
    examples: list[str]


class Survey(NamedTuple):
    """The counts and checks of a prepared set.

    Attributes:
      lengths_S: int64 [samples], tokens of each sample.
      num_labels_S: int64 [samples], targets with loss of each sample.
      row_tokens_R: int64 [rows], tokens of each row that are not padding.
      checks: of all samples.
    """

    lengths_S: IndexArray
    num_labels_S: IndexArray
    row_tokens_R: IndexArray
    checks: list[SampleCheck]

    @property
    def num_failed(self) -> int:
        """The number of checks that do not hold."""
        return sum(check.num_failed > 0 for check in self.checks)

    def quantiles(self) -> dict[str, int]:
        """Percentiles of the lengths and the longest, by name."""
        found = np.percentile(self.lengths_S, PERCENTILES, method="inverted_cdf")
        names = [f"p{percent}" for percent in PERCENTILES]
        return dict(zip(names, map(int, found), strict=True)) | {"max": int(self.lengths_S.max())}


class Fate(NamedTuple):
    """A group of the rows that were read; `num` is None where the filter was off."""

    name: str
    num: int | None
    examples: list[str]


def survey(prepared: Prepared, tokenizer: Tokenizer) -> Survey:
    """Counts and checks every sample.

    Args:
      prepared: the set.
      tokenizer: the one that it was made with.
    """
    rows = prepared.rows
    lengths = np.diff(rows.sample_offsets)
    num_labels = np.zeros(rows.num_samples, np.int64)
    num_failed: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    loss_on_prompt = bool(prepared.manifest["made_from"]["options"]["loss_on_prompt"])
    is_control = np.zeros(tokenizer.vocab_size, bool)
    is_control[sorted(tokenizer.control_ids)] = True
    for first, last in _slices(rows.sample_offsets):
        low, high = rows.sample_offsets[first], rows.sample_offsets[last]
        starts = rows.sample_offsets[first:last] - low
        tokens, mask = np.asarray(rows.tokens_N[low:high]), np.asarray(rows.loss_mask_N[low:high])
        ends = np.append(starts[1:], high - low) - 1
        part = _Part(tokenizer, tokens, mask, starts, ends, loss_on_prompt)
        num_labels[first:last] = np.add.reduceat(part.mask, starts, dtype=np.int64)
        num_labels[first:last] -= part.mask[starts]  # a first token is never a target
        for name, failed, describe in part.checks(is_control):
            indices = np.flatnonzero(failed)
            num_failed[name] = num_failed.get(name, 0) + len(indices)
            kept = examples.setdefault(name, [])
            for i in indices[: _NUM_EXAMPLES - len(kept)].tolist():
                sample = int(first) + i
                kept.append(f"sample {sample} ({source_of(prepared, sample)}): {describe(i)}")
    row_tokens = np.add.reduceat(lengths[rows.row_samples], rows.row_offsets[:-1])
    checks = [SampleCheck(name, count, examples[name]) for name, count in num_failed.items()]
    return Survey(lengths, num_labels, row_tokens, checks)


def _slices(sample_offsets: IndexArray) -> Iterator[tuple[int, int]]:
    """Ranges of samples with at most `_SLICE_TOKENS` tokens, or of one sample."""
    first, num_samples = 0, len(sample_offsets) - 1
    while first < num_samples:
        end = sample_offsets[first] + _SLICE_TOKENS
        last = int(np.searchsorted(sample_offsets, end, "right")) - 1
        last = min(max(last, first + 1), num_samples)
        yield first, last
        first = last


class _Part(NamedTuple):
    """Consecutive samples; int64 [n]: the places of their first and last tokens in [N] arrays."""

    tokenizer: Tokenizer
    tokens: Int32Array
    mask: BoolArray
    starts: IndexArray
    last: IndexArray
    loss_on_prompt: bool

    def checks(self, is_control: BoolArray) -> Iterator[tuple[str, BoolArray, Callable]]:
        """(what must hold, bool [n] of the samples that break it, index -> what is wrong)."""
        bos, begin = self.tokenizer.bos_id, self.tokenizer.start_of_turn_id
        end, num = self.tokenizer.end_of_turn_id, len(self.starts)
        size = self.tokenizer.vocab_size
        found = is_control.take(self.tokens, mode="clip")
        outside = np.zeros(num, bool)
        if self.tokens.view(np.uint32).max() >= size:  # so that a negative id is a large one
            is_outside = (self.tokens < 0) | (self.tokens >= size)
            outside[self._owners(np.flatnonzero(is_outside))] = True
            found &= ~is_outside
        yield "every id is in the vocabulary", outside, lambda i: f"an id outside 0 to {size - 1:,}"

        places = np.flatnonzero(found)
        ids, owners = self.tokens[places], self._owners(places)
        is_bos = ids == bos
        num_bos = np.bincount(owners[is_bos], minlength=num)
        yield (
            "exactly one <bos>, at its start",
            (num_bos != 1) | (self.tokens[self.starts] != bos),
            lambda i: self._describe_bos(places[is_bos & (owners == i)] - self.starts[i]),
        )

        # The others must alternate between begin and end: by their number within the sample.
        turns, ids, whose = places[~is_bos], ids[~is_bos], owners[~is_bos]
        counts = np.bincount(whose, minlength=num)
        number = np.arange(len(ids)) - (np.cumsum(counts) - counts)[whose]
        is_stray = ids != np.where(number % 2 == 0, begin, end)
        out_of_order = np.bincount(whose[is_stray], minlength=num) > 0
        incomplete = (counts == 0) | (counts % _CONTROLS_PER_EXCHANGE != 0)

        is_model_end = number % _CONTROLS_PER_EXCHANGE == _CONTROLS_PER_EXCHANGE - 1
        # A turn that is not to be learnt has no loss at all.
        untrained = is_model_end & ~self.mask[turns] & self.mask[turns - 1]
        untrained &= ~(out_of_order | incomplete)[whose]
        has_untrained = np.bincount(whose[untrained], minlength=num) > 0
        yield (
            "ends in a trained <end_of_turn>, as every trained turn does",
            (self.tokens[self.last] != end) | ~self.mask[self.last] | has_untrained,
            self._describe_end,
        )
        total = np.add.reduceat(self.mask, self.starts, dtype=np.int64)
        before = np.append(0, np.cumsum(self.mask))  # labels in front of a place
        is_model_begin = number % _CONTROLS_PER_EXCHANGE == _CONTROLS_PER_EXCHANGE - 2
        labels = np.where(is_model_end, before[turns + 1], 0)
        labels -= np.where(is_model_begin, before[turns], 0)
        inside = np.bincount(whose, weights=labels, minlength=num)
        elsewhere = (total != inside) & ~(out_of_order | incomplete)
        if not self.loss_on_prompt:
            yield (
                "no loss outside of the model's turns",
                elsewhere,
                lambda i: f"{total[i] - int(inside[i])} labels elsewhere",
            )
        yield (
            "no control id beyond the template's",
            out_of_order | incomplete,
            lambda i: self._describe_stray(i, turns[is_stray & (whose == i)], int(counts[i])),
        )

    def _owners(self, places: IndexArray) -> IndexArray:
        """The sample of each place."""
        return np.searchsorted(self.starts, places, "right") - 1

    def _describe_bos(self, places: IndexArray) -> str:
        if len(places) == 0:
            return "no <bos>"
        where = f"token{'s' if len(places) > 1 else ''} {', '.join(map(str, places[:4].tolist()))}"
        return f"{len(places)} <bos>, at {where}{', …' if len(places) > 4 else ''}"

    def _describe_end(self, i: int) -> str:
        place = self.last[i]
        token = int(self.tokens[place])
        if token != self.tokenizer.end_of_turn_id:
            inside = 0 <= token < self.tokenizer.vocab_size
            text = f" {self.tokenizer.decode([token])!r}" if inside else ""
            return f"ends in token {token}{text}"
        which = "its last" if not self.mask[place] else "an earlier"
        return f"{which} <end_of_turn> carries no loss"

    def _describe_stray(self, i: int, places: IndexArray, count: int) -> str:
        if len(places) == 0:
            not_closed = " and one that is not closed" if count % 2 else ""
            return f"{plural(count // 2, 'whole turn')}{not_closed}"
        token = self.tokenizer.decode([int(self.tokens[places[0]])])
        return f"{token} at token {places[0] - self.starts[i]}"


def fates(prepared: Prepared) -> list[Fate]:
    """The rows that were read: kept, shortened, rejected by reason, noted, kept by file."""
    report, made_from = prepared.report, prepared.manifest["made_from"]
    found = [Fate("kept", report.samples, [])]
    cut = [f"by {report.num_tokens_cut:,} tokens of reasoning in all"] if report.shortened else []
    found.append(Fate("of these shortened", report.shortened, cut))
    rejected = dict.fromkeys(_FILTERS, 0) | report.rejected
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        is_on = made_from["options"].get(_FILTERS.get(reason, ""), True)
        if reason == "contaminated":
            is_on = is_on and bool(made_from["heldout_files"])
        examples = [visible_line(each) for each in report.examples.get(reason, [])]
        what = (count, examples) if is_on or count else (None, ["not looked for"])
        found.append(Fate(f"rejected: {reason}", *what))
    noted = sorted(report.noted.items(), key=lambda item: -item[1])
    found += [Fate(f"noted: {note}", count, []) for note, count in noted]
    if len(report.by_source) > 1:
        for name, counts in report.by_source.items():
            found.append(Fate(f"kept of {name.rpartition('/')[2]}", counts["samples"], [name]))
    return found


def lessons(prepared: Prepared) -> dict[str, str]:
    """What becomes of the rows by the recipe, by name, as text: the system text, the form of the
    answers, the policies, and the columns of each file.

    A set of an earlier version has the default form and knows no policies.
    """
    options, report = prepared.manifest["made_from"]["options"], prepared.report
    template = AnswerTemplate(options.get("answer_template", ANSWER_TEMPLATE))
    opening, end = template.literals[0][-1], template.end_of_answer or "the end"
    plain = plural(report.noted.get("plain_completion", 0), "sample")
    found = {
        "system text": visible_line(options["system_prompt"] or "") or "none",
        "answers": visible_text(template.text).replace("\n", ""),
        "{reasoning}": visible_line(f"from {opening} to {template.end_of_reasoning}"),
        "{answer}": visible_line(f"from {template.start_of_answer} to {end}"),
    }
    for name, policies in _POLICIES.items():
        if name in options:
            found[name] = f"{options[name]}: {policies[options[name]]}"
    if "without_thought" in found:
        found["without_thought"] += f" ({plain})"
    named = options.get("columns") or {}
    if named:
        found["columns"] = ", ".join(
            f"{part}: {visible_line(name)}" for part, name in named.items()
        )
    for file, columns in report.columns.items():
        used, unused = (", ".join(map(visible_line, columns[kind])) for kind in ("used", "unused"))
        found[visible_line(file)] = f"columns used: {used}; not used: {unused or 'none'}"
    return found


def facts(prepared: Prepared, found: Survey) -> dict[str, str]:
    """The counts of a set, by name, as text."""
    rows, quantiles = prepared.rows, found.quantiles()
    num_labels = int(found.num_labels_S[rows.row_samples].sum())
    uses = len(rows.row_samples)
    samples = f"{rows.num_samples:,}"
    if uses != rows.num_samples:
        samples += f", used {uses:,} times by weight"
    return {
        "rows": f"{len(rows):,} of {rows.row_length:,} tokens",
        "samples": f"{samples}; {uses / len(rows):.1f} a row",
        "tokens": f"{rows.num_tokens:,}; {rows.num_tokens / uses:,.0f} a sample",
        "loss tokens": f"{num_labels:,} ({num_labels / rows.num_tokens:.1%} of the tokens)",
        "padding": f"{1 - rows.fill:.1%} of all positions",
        "sample length": ", ".join(f"{name} {length:,}" for name, length in quantiles.items()),
    }
