"""A model on held-out rows: the loss of every token, and generated answers to the prompts."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx

from jaxsft.common.hosts import on_host
from jaxsft.config import EvalOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.intervals import difference, ratio
from jaxsft.evaluate.scoring import ANSWER_METRICS, Comparison, GeneratedAnswer, Metric
from jaxsft.gemma.decode import SamplingOptions, generate
from jaxsft.gemma.sharding import named
from jaxsft.step.score import ModelSpec, token_log_probs

NEXT_QUESTION = "\n\nQuestion:"  # ends an answer to a prompt of `as_text`


class SampleLosses(NamedTuple):
    """Loss sums in nats and numbers of tokens, both [S], of the samples that have such tokens."""

    sums_S: npt.NDArray[np.float64]
    tokens_S: npt.NDArray[np.float64]


_LOSSES = {
    "all": Metric("loss", "held-out loss, nats per completion token", "nats", -1),
    "reasoning": Metric("loss_reasoning", "of the reasoning", "nats", -1),
    "answer": Metric("loss_answer", "of the answer", "nats", -1),
}
METRICS = (*_LOSSES.values(), *ANSWER_METRICS)  # in the order of a table


def held_out_losses(
    adapter: nnx.State,
    frozen: nnx.State,
    rows: PackedRows,
    is_answer_N: npt.NDArray[np.bool_],
    *,
    spec: ModelSpec,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, SampleLosses]:
    """The loss of every sample: of its whole completion ("all"), "reasoning" and "answer".

    Args:
      is_answer_N: `answer_mask` of the rows.
      batch_size: rows over all processes; a multiple of the mesh's size.
      on_batch: called before each batch; may raise.
    """
    losses_N = np.zeros(len(rows.tokens_N))
    sharding = named(spec.mesh, "batch", None)
    for low in range(0, len(rows), batch_size):
        on_batch()
        indices = [i if i < len(rows) else -1 for i in range(low, low + batch_size)]
        # Every process has all rows; each device takes its own of them.
        batch = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            rows.batch(indices),
        )
        losses_BT = -on_host(token_log_probs(adapter, frozen, batch, spec=spec))
        for row, index in enumerate(i for i in indices if i >= 0):
            start = 0
            for sample in rows.row_samples[rows.row_offsets[index] : rows.row_offsets[index + 1]]:
                first, end = rows.sample_offsets[sample : sample + 2]
                stop = start + int(end - first)
                # The loss at a position is of the token after it.
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


def answer_mask(
    rows: PackedRows, tokenizer: Tokenizer, template: AnswerTemplate
) -> npt.NDArray[np.bool_]:
    """bool [N]: the tokens of a completion after the end of its reasoning and the white space
    there, from <answer> with the default template; all tokens of a completion without reasoning.
    """
    is_answer_N = np.zeros(len(rows.tokens_N), bool)
    for first, end in zip(rows.sample_offsets[:-1], rows.sample_offsets[1:], strict=True):
        labels = rows.loss_mask_N[first:end]
        edges = np.flatnonzero(np.diff(labels, prepend=False, append=False)) + first
        for start, stop in edges.reshape(-1, 2):  # a conversation may have several completions
            ids = rows.tokens_N[start:stop].tolist()
            is_answer_N[start + _answer_start(ids, tokenizer, template) : stop] = True
    return is_answer_N


def _answer_start(ids: list[int], tokenizer: Tokenizer, template: AnswerTemplate) -> int:
    """Index of the token in which the answer begins, 0 without reasoning.

    The place is searched for in the text: the ids of a tag depend on the text before it.
    """
    text, end = tokenizer.decode(ids), template.end_of_reasoning
    at = text.find(end)
    if at < 0:
        return 0
    at = len(text) - len(text[at + len(end) :].lstrip())
    # The longest beginning whose text ends before the answer.
    return bisect_right(range(len(ids)), at, key=lambda num: len(tokenizer.decode(ids[:num]))) - 1


def compare_losses(
    left: dict[str, SampleLosses], right: dict[str, SampleLosses] | None = None
) -> list[Comparison]:
    """Loss per completion token of one model, or of two on the same rows, whole and by part; []
    where no row has any."""
    lines = []
    for name, metric in _LOSSES.items() if left else ():
        sums_S, tokens_S = left[name]
        if not len(sums_S):
            continue
        estimates, gain = [ratio(sums_S, tokens_S)], None
        if right is not None:
            estimates.append(ratio(*right[name]))
            gain = difference(sums_S, right[name].sums_S, tokens_S)
        lines.append(Comparison(metric, estimates, gain))
    return lines


class Prompt(NamedTuple):
    """A prompt's ids with BOS, the text of its last user turn, and the row's own answer."""

    ids: list[int]
    text: str
    reference: str


def read_prompts(
    samples: Sequence[Sample], tokenizer: Tokenizer, system_prompt: str | None
) -> list[Prompt]:
    """The prompts of samples; their text is without the `system_prompt` in front."""
    prompts = []
    for sample in samples:
        start = sample.completion_start
        ids, completion = sample.ids[:start].tolist(), sample.ids[start:].tolist()
        text = _last_user_text(ids, tokenizer)
        if system_prompt:
            text = text.removeprefix(f"{system_prompt.strip()}\n\n")
        prompts.append(Prompt(ids, text, tokenizer.decode(completion, skip_special=True)))
    return prompts


def _last_user_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of a prompt's last user turn, with the system text in front of it.

    It is cut at control ids, as a user's text may contain the text of control tokens.
    """
    start, _ = [i for i, token in enumerate(ids) if token == tokenizer.start_of_turn_id][-2:]
    turn = ids[start + 1 : ids.index(tokenizer.end_of_turn_id, start)]
    return tokenizer.decode(turn).removeprefix("user\n")


def with_examples(
    prompts: Sequence[Prompt], examples: Sequence[Sample], tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts with solved examples as the turns before them.

    Only the first example may have a system text, as in any conversation.
    """
    ids: list[int] = []
    for example in examples:
        ids += example.ids.tolist()[bool(ids) :] + tokenizer.encode("\n")
    return [prompt._replace(ids=ids + prompt.ids[bool(ids) :]) for prompt in prompts]


def as_text(
    prompts: Sequence[Prompt], examples: Sequence[Prompt], tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts as plain text after solved examples, as in lm-evaluation-harness's GSM8K.

    A pretrained model has never seen the end of a turn and cannot write one. Such an answer ends
    where `NEXT_QUESTION` begins.
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
    spec: ModelSpec,
    options: EvalOptions,
    on_batch: Callable[[], None] = lambda: None,
    stop_text: str | None = None,
) -> list[GeneratedAnswer]:
    """Generates an answer to each prompt; `on_batch` as in `held_out_losses`.

    An answer ends before `stop_text`. It is cut where the model begins another turn, as base models
    do; then it is neither `stopped` nor `truncated`.
    """
    generations = generate(
        spec.builder,
        adapter,
        frozen,
        [prompt.ids for prompt in prompts],
        options=SamplingOptions.from_fields(options),
        stop_ids=tokenizer.stop_ids,
        num_ids=tokenizer.vocab_size,
        on_batch=on_batch,
        mesh=spec.mesh,
    )
    answers = []
    for prompt, generation in zip(prompts, generations, strict=True):
        ids, stopped = generation.ids, generation.stopped
        truncated = not stopped
        if tokenizer.start_of_turn_id in ids:
            ids = ids[: ids.index(tokenizer.start_of_turn_id)]
            stopped = truncated = False
        text = tokenizer.decode(ids)
        if stop_text is not None and stop_text in text:
            text = text.partition(stop_text)[0]
            ids, stopped, truncated = tokenizer.encode(text), True, False
        answers.append(
            GeneratedAnswer(prompt.text, prompt.reference, text, len(ids), stopped, truncated)
        )
    return answers
