"""What export writes, against transformers and PEFT in this process."""

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from support.lora_twins import make_peft, twin
from support.twins import TWINS, WINDOW

from jaxsft.common.files import write_json
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_chat, encode_prompt
from jaxsft.data.replies import Rejected
from jaxsft.data.rows import RowOptions, Turn, convert_row
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.chat_template import chat_template
from jaxsft.export.formats import write_weights
from jaxsft.export.hostile import hostile_texts
from jaxsft.export.tokenizer import write_tokenizer
from jaxsft.export.transformers_worker import _token_ids
from jaxsft.export.verify import ids_problem, pieces_problem
from jaxsft.weights.adapter_config import read_adapter_config
from jaxsft.weights.find import Taught
from jaxsft.weights.hf_config import to_hf_config
from jaxsft.weights.load import load_model, open_weights
from jaxsft.weights.merged import MergedWeights

pytestmark = [
    # peft 0.21 reads it of every transformers model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

LOGIT_BOUND = 1e-4
DEFAULT = ("gemma2", "gemma3-1b")
CASES = [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in TWINS]
TOKENS = torch.tensor(np.random.default_rng(0).integers(4, 256, (2, 3 * WINDOW)))


class Case:
    """A base in a Hugging Face directory, and an adapter that PEFT made and saved."""

    def __init__(self, name: str, root: Path) -> None:
        hf_model, self.model = twin(name)
        self.peft_model = make_peft(hf_model, random_b=True).eval()
        self.base, self.adapter = root / "base", root / "adapter"
        hf_model.save_pretrained(self.base)
        self.peft_model.save_pretrained(self.adapter)
        self.adapter_config = read_adapter_config(self.adapter)
        self.config = self.model.config

    def weights(self) -> MergedWeights:
        return MergedWeights(*open_weights(self.base), self.adapter, self.adapter_config)

    def write(self, directory: Path, dtype: str = "float32", max_shard_bytes: int = 2**30) -> None:
        directory.mkdir()
        write_json(directory / "config.json", to_hf_config(self.config) | {"dtype": dtype})
        write_weights(directory, self.weights(), dtype=dtype, max_shard_bytes=max_shard_bytes)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", CASES)
def test_merged_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    case.write(tmp_path / "out", max_shard_bytes=40_000)

    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 2
    assert max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < 50_000
    ours, reference = logits(loaded(tmp_path / "out")), logits(case.peft_model)
    assert (ours - reference).abs().max() <= LOGIT_BOUND
    with case.peft_model.disable_adapter():
        assert (logits(case.peft_model) - reference).abs().max() > 1000 * LOGIT_BOUND
    # It can be read here again, too: a merged model is a starting point like any other.
    _, info = load_model(tmp_path / "out", dtype="float32", param_dtype="float32")
    assert info.config.layer_types == case.config.layer_types


@pytest.mark.parametrize("name", ["gemma1", "gemma3-1b"])
def test_merged_tensors(name: str, tmp_path: Path) -> None:
    """Against float64; untouched tensors are the base's, bit for bit; unmerged it is the base."""
    case = Case(name, tmp_path)
    case.write(tmp_path / "out")
    base, merged = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    assert merged.keys() == base.keys() and "lm_head.weight" not in merged
    scale, num_adapted = 7.0 / 3, 0
    for name_, weight in merged.items():
        key = f"base_model.model.{name_.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") not in adapter:
            assert weight.tobytes() == base[name_].tobytes(), name_
            continue
        num_adapted += 1
        b, a = (adapter[key.format(ab)].astype(np.float64) for ab in "BA")
        update = scale * (b @ a)
        size = np.abs(base[name_]) + scale * (np.abs(b) @ np.abs(a))
        rounding = 4 * np.finfo(np.float32).eps * size
        assert (np.abs(weight - (base[name_] + update)) <= rounding).all(), name_
        unmerged = weight - update.astype(np.float32)
        assert (np.abs(unmerged - base[name_]) <= rounding).all(), name_
    assert num_adapted == 7 * case.config.num_layers


def test_bfloat16(tmp_path: Path) -> None:
    """Rounded once, from the float32 sum; the embedding of a bfloat16 base stays as it is.

    The logits, computed in float32, move by no more than the weights' rounding of 2^-9 does: 0.05
    of logits up to 30 was seen.
    """
    case = Case("gemma2", tmp_path)
    case.write(tmp_path / "exact")
    case.write(tmp_path / "out", dtype="bfloat16")
    exact, rounded = (load_file(tmp_path / d / "model.safetensors") for d in ("exact", "out"))
    for name, weight in exact.items():
        assert rounded[name].tobytes() == weight.astype(ml_dtypes.bfloat16).tobytes(), name
    moved = (logits(loaded(tmp_path / "out")) - logits(case.peft_model)).abs().max()
    assert LOGIT_BOUND < moved < 3.0

    half = Case("gemma2", tmp_path / "half")
    copy.deepcopy(twin("gemma2")[0]).to(torch.bfloat16).save_pretrained(half.base)
    half.write(tmp_path / "again", dtype="bfloat16")
    base, out = (load_file(d / "model.safetensors") for d in (half.base, tmp_path / "again"))
    embedding = "model.embed_tokens.weight"
    assert out[embedding].tobytes() == base[embedding].tobytes()


def test_the_adapter_must_fit(tmp_path: Path) -> None:
    case, other = Case("gemma1", tmp_path / "1"), Case("gemma2", tmp_path / "2")
    with pytest.raises(ValueError, match=r"14 unexpected: .*layers\.3\.\*\.weight, layer 3\)"):
        MergedWeights(*open_weights(case.base), other.adapter, other.adapter_config)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer of the files that we write for the real vocabulary."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, tokenizer, max_positions=32_768, taught=None)
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_tokenizer_gives_our_ids(exported: Any, tokenizer: Tokenizer) -> None:
    golden = json.loads(
        (Path(__file__).parents[1] / "support/golden/tokenizer_gemma3.json").read_text()
    )
    texts = [case["text"] for case in golden["cases"] + golden["literal_u2581"]]
    texts += [
        " " * 40,
        "\n" * 40,
        "\t" * 50,
        "if x:\n        return  y\n",
        Path(__file__).read_text(),
    ]
    found = exported(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert [t for t, ids in zip(texts, found, strict=True) if ids != tokenizer.encode(t)] == []
    assert exported("Hello").input_ids == [tokenizer.bos_id, *tokenizer.encode("Hello")]
    assert (exported.eos_token_id, exported.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    hostile = hostile_texts(tokenizer)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    settings = {"texts": hostile.plain, "lookalikes": hostile.lookalikes, "pieces": pieces}
    *found, places = _token_ids(exported, settings | {"chats": []})
    theirs = [*hostile.plain, *hostile.lookalikes]
    assert ids_problem(theirs, tokenizer.encode_many(theirs), found) is None
    assert pieces_problem(pieces, places) is None and len(theirs) > 400
    for text in texts[:40]:
        assert exported.decode(tokenizer.encode(text)) == text


CHATS = [
    [Turn("user", "Hi")],
    [Turn("system", " Be brief.\n"), Turn("user", "\n x  = 1\n\n\n    y\t")],
    [Turn("system", "  "), Turn("user", "{{ 7 * 7 }} <b>ß</b>")],
    [Turn("user", "One?"), Turn("assistant", " Two. "), Turn("user", "Three\n")],
]


@pytest.mark.parametrize("chat", CHATS)
def test_chat_template_gives_our_ids(chat: list[Turn], exported: Any, tokenizer: Tokenizer) -> None:
    messages = [turn._asdict() for turn in chat]
    prompt = exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_prompt(tokenizer, chat)
    answer = Turn("assistant", "<reasoning>a</reasoning>\n<answer>b</answer>")
    whole = exported.apply_chat_template([*messages, answer._asdict()], return_dict=False)
    # The template ends every turn with a newline, training the last one with <end_of_turn>.
    newline = tokenizer.encode("\n")
    assert whole == [*encode_chat(tokenizer, [*chat, answer]).ids.tolist(), *newline]


@pytest.mark.parametrize("system", ['Say "{{ x }}" \\n\n%} {% if %} 🙂\x1b', " spaced \n"])
def test_a_chat_without_a_system_turn_has_the_training_s(
    system: str, exported: Any, tokenizer: Tokenizer
) -> None:
    for chat in CHATS:
        default = [Turn("system", system)] if chat[0].role != "system" else []
        prompt = exported.apply_chat_template(
            [turn._asdict() for turn in chat],
            chat_template=chat_template(Taught(system, AnswerTemplate(), "keep")),
            add_generation_prompt=True,
            return_dict=False,
        )
        assert prompt == encode_prompt(tokenizer, [*default, *chat])


FORMS = [
    AnswerTemplate(),
    AnswerTemplate("<think>{reasoning}</think>\n\n{answer}"),
    AnswerTemplate("Why: {reasoning}\nSo <b>{answer}</b> it is"),
]
PARTS = [{"type": "text", "text": " One, "}, "two ", {"type": "input_text", "text": "three? "}]
MESSAGES = [
    {"role": "user", "content": PARTS},
    {"role": "assistant", "content": [{"type": "text", "text": "Plain "}], "weight": 0},
    {"role": "user", "content": " Again "},
    {"role": "assistant", "content": " A ", "reasoning_content": " First.\n", "tool_calls": None},
    {"role": "user", "content": "And\n\nthen?"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "B"}], "reasoning": "Then."},
]


@pytest.mark.parametrize("earlier", ["keep", "strip"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.markers[0])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": PARTS[:1]}]])
def test_chat_template_gives_the_ids_of_training(
    system: list[Any], form: AnswerTemplate, earlier: Any, exported: Any, tokenizer: Tokenizer
) -> None:
    """Parts, reasoning in a field, turns not to be learnt, earlier reasoning kept or stripped."""
    template = chat_template(Taught("Think.", form, earlier))
    chat = [*system, *MESSAGES]
    row = convert_row({"messages": chat}, RowOptions(earlier_reasoning=earlier, template=form))
    assert not isinstance(row, Rejected), row
    turns = [*([] if system else [Turn("system", "Think.")]), *row.turns]

    def rendered(messages: list[Any], **options: Any) -> list[int]:
        return exported.apply_chat_template(
            messages, chat_template=template, return_dict=False, **options
        )

    whole = encode_chat(tokenizer, turns).ids.tolist()
    assert rendered(chat) == [*whole, *tokenizer.encode("\n")]
    prompt = encode_prompt(tokenizer, turns[:-1])
    assert rendered(chat[:-1], add_generation_prompt=True) == prompt
    # An answer, or its reasoning, can be continued.
    last = {"role": "assistant", "content": form.join("Then.", "B")[:-3]}
    continued = rendered([*chat[:-1], last], continue_final_message=True)
    assert continued == [*prompt, *tokenizer.encode(last["content"])]
    last = {"role": "assistant", "content": None, "reasoning_content": "Then"}
    continued = rendered([*chat[:-1], last], continue_final_message="reasoning_content")
    assert continued == [*prompt, *tokenizer.encode(f"{form.opening}Then")]
    # A server that cuts off the reasoning may leave the answer in its tags.
    answer = form.closing("B").strip().removeprefix(form.end_of_reasoning)
    last = {"role": "assistant", "content": answer, "reasoning": "Then."}
    assert rendered([*chat[:-1], last])[: len(whole)] == whole


def test_chat_template_of_texts_is_that_of_before(exported: Any) -> None:
    """Byte for byte, for models of which nothing is known as well."""
    texts = ["Hi", " a\n", "", "<reasoning>r</reasoning>\n<answer>a</answer>", "{{ x }}"]
    chat = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]
    expected = "<bos>" + "".join(
        f"<start_of_turn>{'model' if i % 2 else 'user'}\n{text.strip()}<end_of_turn>\n"
        for i, text in enumerate(texts)
    )
    for taught in (None, Taught("", AnswerTemplate(), "keep")):
        template = chat_template(taught)
        assert (
            exported.apply_chat_template(chat, chat_template=template, tokenize=False) == expected
        )


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": [{"type": "text", "text": "x"}, {"type": "image"}]}, "not text: image"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "not text: image_url"),
        ({"content": [{"type": "input_audio", "text": "x"}]}, "not text: input_audio"),
        ({"content": [{"type": "text", "text": None}]}, "not text: text"),
        ({"content": [5]}, "not text"),
        ({"content": {"type": "text", "text": "x"}}, "neither a text nor a list of parts"),
        ({"content": 5}, "neither a text nor a list of parts"),
        ({"content": None}, "null or missing"),
        ({}, "null or missing"),
        ({"content": "x", "tool_calls": [{"id": "1"}]}, "not trained to call tools"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "not trained to call tools"),
    ],
)
def test_chat_template_refuses_what_is_no_text(
    message: dict[str, Any], fault: str, exported: Any
) -> None:
    user = {"role": "user", "content": "x"}
    chats = [[user, {"role": "assistant"} | message]]
    if "tool_calls" not in message:
        chats += [[{"role": "user"} | message], [{"role": "system"} | message, user]]
    for chat in chats:
        with pytest.raises(Exception, match=fault):
            exported.apply_chat_template(chat)


def test_chat_template_refuses_what_training_did_not_have(exported: Any) -> None:
    user = {"role": "user", "content": "x"}
    for options in ({"tools": [{"type": "function"}]}, {"documents": [{"text": "x"}]}):
        with pytest.raises(Exception, match="not trained with tools or documents"):
            exported.apply_chat_template([user], **options)
    # Of a base model, or a foreign adapter, it is not known in which form.
    with pytest.raises(Exception, match="it is not known how this model was trained to reason"):
        exported.apply_chat_template([user, user | {"role": "assistant", "reasoning": "r"}])


def test_chat_template_refuses_other_roles(exported: Any) -> None:
    for roles in (["assistant"], ["user", "user"], ["user", "system"], ["user", "tool"]):
        with pytest.raises(Exception, match="the roles must be"):
            exported.apply_chat_template([{"role": role, "content": "x"} for role in roles])
