"""What a model does on held-out rows: the loss of every token, and answers to the prompts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx

from jaxsft.common.hosts import on_host
from jaxsft.config import EvalOptions
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.intervals import difference, ratio
from jaxsft.evaluate.scoring import ANSWER_METRICS, Answer, Comparison, Metric
from jaxsft.gemma.decode import generate
from jaxsft.gemma.sharding import named
from jaxsft.step.train_step import StepSpec, eval_step

NEXT_QUESTION = "\n\nQuestion:"  # of `as_text`
_ANSWER = "<answer>"

Floats = npt.NDArray[np.float64]


class SampleLosses(NamedTuple):
    """Sums in nats and numbers of tokens [S] of every sample that has any such token."""

    sums_S: Floats
    tokens_S: Floats


_LOSSES = {
    "all": Metric("loss", "held-out loss, nats per completion token", "nats", -1),
    "reasoning": Metric("loss_reasoning", "of the reasoning", "nats", -1),
    "answer": Metric("loss_answer", "of the answer", "nats", -1),
}
METRICS = (*_LOSSES.values(), *ANSWER_METRICS)  # of a model, in the order of a table


def held_out_losses(
    adapter: nnx.State,
    frozen: nnx.State,
    rows: PackedRows,
    is_answer_N: npt.NDArray[np.bool_],
    *,
    spec: StepSpec,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, SampleLosses]:
    """Losses of every sample by part: "all", and "reasoning" and "answer" apart.

    Args:
      is_answer_N: `answer_mask` of the rows.
      batch_size: over all processes; a multiple of the mesh's size.
      on_batch: is called before each batch and may raise.
    """
    losses_N = np.zeros(len(rows.tokens_N))
    sharding = named(spec.mesh, "batch", None)
    for low in range(0, len(rows), batch_size):
        on_batch()
        indices = [i if i < len(rows) else -1 for i in range(low, low + batch_size)]
        # Every process knows all rows: each device takes its own, in whatever order they stand.
        batch = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            rows.batch(indices),
        )
        losses_BT = on_host(eval_step(adapter, frozen, batch, spec=spec))
        for row, index in enumerate(i for i in indices if i >= 0):
            start = 0
            for sample in rows.row_samples[rows.row_offsets[index] : rows.row_offsets[index + 1]]:
                first, end = rows.sample_offsets[sample : sample + 2]
                stop = start + int(end - first)
                # A position's loss is that of the token after it.
                losses_N[first + 1 : end] = losses_BT[row, start : stop - 1]
                start = stop
    is_label_N = rows.loss_mask_N.copy()
    is_label_N[rows.sample_offsets[:-1]] = False
    parts = {"all": is_label_N, "reasoning": is_label_N & ~is_answer_N}
    parts["answer"] = is_label_N & is_answer_N
    found = {}
    for name, mask_N in parts.items():
        starts = rows.sample_offsets[:-1]
        tokens_S = np.add.reduceat(mask_N, starts, dtype=np.float64)
        sums_S = np.add.reduceat(np.where(mask_N, losses_N, 0.0), starts)
        found[name] = SampleLosses(sums_S[tokens_S > 0], tokens_S[tokens_S > 0])
    return found


def answer_mask(rows: PackedRows, tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """bool [N]: the tokens of a completion from the one that begins <answer> to its end; all of a
    completion without that tag."""
    is_answer_N = np.zeros(len(rows.tokens_N), bool)
    for first, end in zip(rows.sample_offsets[:-1], rows.sample_offsets[1:], strict=True):
        labels = rows.loss_mask_N[first:end]
        edges = np.flatnonzero(np.diff(labels, prepend=False, append=False)) + first
        for start, stop in edges.reshape(-1, 2):  # a conversation may have several completions
            is_answer_N[
                _answer_start(rows.tokens_N[start:stop].tolist(), tokenizer) + start : stop
            ] = True
    return is_answer_N


def _answer_start(ids: list[int], tokenizer: Tokenizer) -> int:
    """Index of the token in which <answer> begins: tags are matched on text, as what stands before
    a tag decides its ids. 0 without the tag."""
    at = tokenizer.decode(ids).find(_ANSWER)
    low, high = 0, len(ids)
    while low < high and at > 0:  # the longest head whose text ends before the tag
        middle = (low + high + 1) // 2
        if len(tokenizer.decode(ids[:middle])) <= at:
            low = middle
        else:
            high = middle - 1
    return low


def compare_losses(
    left: dict[str, SampleLosses], right: dict[str, SampleLosses] | None = None
) -> list[Comparison]:
    """Loss per completion token of one model, or of two on the same rows, all and by part."""
    lines = []
    for name, metric in _LOSSES.items():
        sides = [left[name]] if right is None else [left[name], right[name]]
        if not len(sides[0].sums_S):
            continue
        estimates = [ratio(side.sums_S, side.tokens_S) for side in sides]
        gain = None
        if right is not None:
            gain = difference(left[name].sums_S, right[name].sums_S, left[name].tokens_S)
        lines.append(Comparison(metric, estimates, gain))
    return lines


class Prompt(NamedTuple):
    """A prompt's ids, BOS included, its last user turn, and the row's own answer, as text."""

    ids: list[int]
    text: str
    reference: str


def read_prompts(
    samples: Sequence[Sample], tokenizer: Tokenizer, system_prompt: str | None
) -> list[Prompt]:
    """The prompts of samples, which `system_prompt` stands in front of; it isn't shown."""
    prompts = []
    for sample in samples:
        ids, completion = split_prompt(sample)
        text = _last_user_text(ids, tokenizer)
        if system_prompt:
            text = text.removeprefix(f"{system_prompt.strip()}\n\n")
        prompts.append(Prompt(ids, text, tokenizer.decode(completion, skip_special=True)))
    return prompts


def _last_user_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of a prompt's last user turn, the system text in front of it included.

    The control ids bound it, as a user's text may quote what these decode to.
    """
    start, _ = [i for i, token in enumerate(ids) if token == tokenizer.start_of_turn_id][-2:]
    turn = ids[start + 1 : ids.index(tokenizer.end_of_turn_id, start)]
    return tokenizer.decode(turn).removeprefix("user\n")


def split_prompt(sample: Sample) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) of a sample, cut where its last assistant turn begins."""
    start = sample.completion_start
    return sample.ids[:start].tolist(), sample.ids[start:].tolist()


def with_examples(
    prompts: Sequence[Prompt], examples: Sequence[Sample], tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts with solved examples as the turns before them, `encode_prompt` of all in one.

    Only the first example may have a system text, as only the first turn of a conversation can.
    """
    ids: list[int] = []
    for example in examples:
        ids += example.ids.tolist()[bool(ids) :] + tokenizer.encode("\n")
    return [prompt._replace(ids=ids + prompt.ids[bool(ids) :]) for prompt in prompts]


def as_text(
    prompts: Sequence[Prompt], examples: Sequence[Prompt], tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts as plain text behind solved examples, the form of lm-evaluation-harness's GSM8K.

    A pretrained model has never seen the ends of turns, and can't end one. An answer in this form
    ends where `NEXT_QUESTION` begins.
    """
    head = "".join(f"Question: {each.text}\nAnswer: {each.reference}\n\n" for each in examples)
    texts = (f"{head}Question: {prompt.text}\nAnswer:" for prompt in prompts)
    ids = ([tokenizer.bos_id, *tokenizer.encode(text)] for text in texts)
    return [prompt._replace(ids=each) for prompt, each in zip(prompts, ids, strict=True)]


def answer_prompts(
    adapter: nnx.State,
    frozen: nnx.State,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    spec: StepSpec,
    options: EvalOptions,
    on_batch: Callable[[], None] = lambda: None,
    stop_text: str | None = None,
) -> list[Answer]:
    """Generates an answer to each prompt; `on_batch` as in `held_out_losses`.

    An answer ends before `stop_text`. It is cut where the model begins another turn, as a base
    model does that goes on with questions of its own; such a one neither stopped by itself nor
    reached the limit.
    """
    generations = generate(
        spec.graphdef,
        adapter,
        frozen,
        [prompt.ids for prompt in prompts],
        options=options,
        stop_ids=tokenizer.stop_ids,
        num_ids=tokenizer.vocab_size,
        on_batch=on_batch,
        mesh=spec.mesh,
    )
    answers = []
    for prompt, (ids, stopped) in zip(prompts, generations, strict=True):
        truncated = not stopped
        if tokenizer.start_of_turn_id in ids:
            ids = ids[: ids.index(tokenizer.start_of_turn_id)]
            stopped = truncated = False
        text = tokenizer.decode(ids)
        if stop_text is not None and stop_text in text:
            text = text.partition(stop_text)[0]
            ids, stopped, truncated = tokenizer.encode(text), True, False
        answers.append(Answer(prompt.text, prompt.reference, text, len(ids), stopped, truncated))
    return answers
