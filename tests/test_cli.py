"""The command line: every recipe, overrides, --help, --print_config, and complaints of one line."""

import dataclasses
import functools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

import jaxsft
from jaxsft import config as config_module
from jaxsft import grpo_hints, hints
from jaxsft.__main__ import COMMANDS, main
from jaxsft.cli import EXIT_BAD_INPUT, command_line, parse_config, parse_options, recipe_names
from jaxsft.config import GrpoConfig, TrainConfig
from jaxsft.config_check import check_devices
from jaxsft.hints import hint_for
from jaxsft.step.optimizer import make_schedule


def parse(*argv: str) -> TrainConfig:
    return parse_config("jaxsft.train", "Trains.", argv)[0]


def schedule(config: TrainConfig, num_steps: int) -> Any:
    return make_schedule(
        config.lr_scheduler_type,
        peak=config.learning_rate,
        end=config.min_learning_rate,
        warmup_steps=config.warmup_steps,
        num_steps=num_steps,
    )


def parse_grpo(*argv: str) -> GrpoConfig:
    (config,) = parse_options("x", "", argv, GrpoConfig, default_recipe="grpo_demo")
    return config


@functools.cache
def field_docs(options: type = TrainConfig, prefix: str = "") -> dict[str, str]:
    """Option name -> the text under its field, as --help should have it."""
    kinds = reversed(options.__mro__[:-1])  # each has the docs of its own fields
    params = [each for kind in kinds for each in docstring_parser.parse_from_object(kind).params]
    docs, found = {each.arg_name: each.description for each in params}, {}
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(field.type):
            found |= field_docs(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = docs[field.name]
    return found


def test_recipes_are_those_of_the_project() -> None:
    of_a_tpu = ["single_session", "single_session_packed", "unrestricted"]
    assert recipe_names() == ["demo", "grpo_warmup", "gsm8k", *of_a_tpu]
    of_grpo = ["grpo_demo", "grpo_gsm8k", "grpo_math_code", "grpo_mix", "grpo_writeup"]
    assert recipe_names(GrpoConfig) == of_grpo


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name: str) -> None:
    config = parse("--config", name)
    assert config.name == name
    assert config.data.train_files and config.data.overlong == "shorten"
    if name == "grpo_warmup":  # short prompts, a small adapter: minutes on a laptop
        assert config.data.system_prompt is None and config.lora.r == config.lora.alpha == 32
        return
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 64, 0)
    assert config.lora.target_modules == "all-linear"
    assert config.data.system_prompt == config_module.SYSTEM_PROMPT
    assert not config.data.loss_on_prompt
    # Every batch splits over the eight chips that the big recipes are for.
    check_devices(config, 1 if name in ("demo", "gsm8k") else 8)


@pytest.mark.parametrize("name", recipe_names(GrpoConfig))
def test_every_grpo_recipe_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_grpo("--config", name)
    assert config.name == name and config.data.eval_files and config.max_steps
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_grpo("--config", name, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["rewards"] == config.rewards
    with pytest.raises(ValueError, match=r"is a recipe of python -m jaxsft\.grpo$"):
        parse("--config", name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rollout.top_k", "50"), r"rollout\.top_k 50 changes the distribution"),
        (("--rollout.temperature", "0.9"), r"rollout\.temperature 0\.9 changes"),
        (("--rollout.top_p", "0.9"), r"rollout\.top_p 0\.9 changes"),
        (("--lora.dropout", "0.1"), r"lora\.dropout makes trainer and sampler two models"),
        (("--rollout.num_generations", "1"), "must be 2 or above"),
        (("--max_steps", "5", "--objective.num_iterations", "2"), "max_steps 5 is not a multiple"),
        (("--rollout.max_new_tokens", "2000"), "leaves no room for a prompt"),
        (("--objective.loss_type", "gspo"), "loss_type"),
        (("--multihost", "true"), "one host.* take a slice"),
        (("--budget_hours", "9"), "leave it out and set max_seconds"),
    ],
)
def test_what_grpo_does_not_do_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_grpo("--config", "grpo_gsm8k", *options)


def test_no_config_means_the_demo() -> None:
    assert parse() == parse("--config", "demo") == parse("--config=demo")
    files = [parse().data.train_files, parse().data.eval_files]
    assert files == [["data/sample/train.jsonl"], ["data/sample/heldout.jsonl"]]
    assert parse().model.path == "demo"


def test_single_session_is_the_run_it_reimplements() -> None:
    config = parse("--config", "single_session")
    assert config.data.train_files == ["data/glaive/train-0-180000"]
    assert config.max_steps == 180_000 * 4 / 32 == 22_500
    assert config.global_batch_size == 32 and config.data.max_length == 2048
    assert not config.data.packing
    assert (config.save_steps, config.save_total_limit) == (500, 2)
    assert (config.weight_decay, config.max_grad_norm) == (0.01, 1.0)
    rate = schedule(config, 22_500)
    assert rate(0) == 0 and rate(100) == pytest.approx(1e-5)
    assert rate(200) == pytest.approx(2e-5)
    # Half-way between 200 and 22,500 a cosine is half-way between peak and end.
    assert rate(11_350) == pytest.approx((2e-5 + 1e-6) / 2)
    assert rate(22_500) == pytest.approx(2e-5 / 20)
    # Answers are greedy: top_k 1 in other words.
    assert (config.eval.temperature, config.eval.seed) == (0, 42)
    assert config.eval.max_new_tokens == 768
    # Nine measurements on the way, each of 64 answers, four rows a chip at once.
    heldout = ["data/gsm8k/test", "data/glaive/train-280000-280512"]
    assert config.data.eval_files == heldout and config.eval_steps == 2500
    assert (config.eval.num_prompts, config.eval.batch_size) == (64, 32)


def test_unrestricted_continues_it() -> None:
    config, first = parse("--config", "unrestricted"), parse("--config", "single_session")
    assert config.data.train_files == ["data/glaive/train-180000-280000"]
    assert config.max_steps == 100_000 * 2 / 32 == 6_250
    assert config.fork_from == f"{first.output_dir}/{first.name}"
    assert config.model == first.model
    assert config.data == dataclasses.replace(first.data, train_files=config.data.train_files)
    rate = schedule(config, 6_250)
    assert rate(100) == pytest.approx(5e-6) and rate(6_250) == pytest.approx(1e-7)


def test_packed_recipe_has_the_same_samples_and_tokens_a_step() -> None:
    config, first = parse("--config", "single_session_packed"), parse("--config", "single_session")
    assert config.data.packing and config.max_steps is None and config.num_train_epochs == 4
    assert (config.global_batch_size, config.data.max_length) == (16, 4096)
    assert first.global_batch_size * first.data.max_length == 16 * 4096
    same = {"max_length": 2048, "packing": False}
    assert dataclasses.replace(config.data, **same) == first.data
    assert (config.learning_rate, config.min_learning_rate) == (2e-5, 1e-6)


def test_overrides_win_over_the_recipe_and_leave_the_rest(tmp_path: Path) -> None:
    argv = ["--config", "single_session", "--lora.r", "8", "--data.stop=9", "--max_steps=null"]
    config, first = parse(*argv, "--learning_rate", "1e-3"), parse("--config", "single_session")
    assert (config.lora.r, config.data.stop, config.max_steps) == (8, 9, None)
    assert config.learning_rate == 1e-3
    changed = {
        "lora": dataclasses.replace(first.lora, r=8),
        "data": dataclasses.replace(first.data, stop=9),
        "max_steps": None,
        "learning_rate": 1e-3,
    }
    assert config == dataclasses.replace(first, **changed)
    # One file may be given without brackets, several with them.
    assert parse("--data.train_files", "a.jsonl").data.train_files == "a.jsonl"
    assert parse("--data.train_files", "[a, b]").data.train_files == ["a", "b"]
    # A file of one's own, with numbers as people write them: YAML takes 2e-3 for a text.
    mine = tmp_path / "mine.yaml"
    mine.write_text("learning_rate: 2e-3\ndata:\n  train_files: [a.jsonl]\n")
    assert parse("--config", str(mine)).learning_rate == 2e-3
    # What the file leaves out has the default of config.py, not the demo's value.
    assert parse("--config", str(mine)).data.max_length == TrainConfig().data.max_length


@pytest.mark.parametrize("name", recipe_names())
def test_print_config_reloads_to_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", name, "--lora.dropout", "0.25", "--seed", "7"]
    with pytest.raises(SystemExit, match=r"^0$"):
        parse(*argv, "--print_config")
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert parse("--config", str(again)) == parse(*argv)
    # The same text is what a run keeps as config.yaml.
    assert parse_config("jaxsft.train", "Trains.", argv)[1] == printed


def test_help_has_every_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        parse("--help")
    out, err = capsys.readouterr()
    assert not err and out.startswith("usage: python -m jaxsft.train ")
    assert max(map(len, out.splitlines())) <= 100
    words = " ".join(out.split())
    docs = field_docs()
    assert {"learning_rate", "lora.r", "eval.top_p"} < docs.keys() and len(docs) > 40
    for option, text in docs.items():
        assert re.search(rf"--{re.escape(option)}[ ,]", words), option
        assert " ".join(text.split()) in words, option
    for name in recipe_names():
        assert name in words
    assert "Trains." in words


def test_dashes_and_switches() -> None:
    config = parse("--max-seconds", "300", "--fit-deadline", "--fork-from=a-b/c-d", "--name", "x-y")
    assert (config.max_seconds, config.fit_deadline) == (300.0, True)
    assert (config.fork_from, config.name) == ("a-b/c-d", "x-y")
    assert parse("--data.loss-on-prompt").data.loss_on_prompt
    assert not parse("--data.packing", "false").data.packing


def test_the_command_to_go_on_has_no_old_deadline() -> None:
    argv = ["--deadline", "2026-01-01T10:00", "--name", "a b", "--fit-deadline", "--seed", "1"]
    argv += ["--deadline=2026-01-01"]
    assert (
        command_line("jaxsft.train", argv)
        == "python -m jaxsft.train --name 'a b' --fit-deadline --seed 1"
    )


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("--lora_r", "lora.r"),
        ("--lora.rank", "lora.r"),
        ("--lerning_rate=3", "learning_rate"),
        ("--epochs", "num_train_epochs"),
        ("--max_length", "data.max_length"),
        ("--train_file", "data.train_files"),
    ],
)
def test_unknown_option_names_the_nearest(written: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="unknown option") as error:
        parse(written, "1")
    name = written.lstrip("-").partition("=")[0]
    assert f"unknown option {name!r}; did you mean --{nearest}?" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("lerning_rate: 1.0e-3", "learning_rate"),
        ("lora:\n  rank: 3", "lora.r"),
        ("lora_alpha: 3", "lora.alpha"),
        ("data:\n  packed: true", "data.packing"),
    ],
)
def test_unknown_key_in_a_file_names_the_nearest(text: str, nearest: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"data:\n  train_files: [a]\n{text}" if "data:" not in text else text)
    with pytest.raises(ValueError) as error:
        parse("--config", str(path))
    assert f"did you mean --{nearest}?" in str(error.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no such file or recipe; did you mean 'unrestricted'"):
        parse("--config", "unrestrict.yaml")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--learning_rate", "-1e-3"], "learning_rate is -0.001, but must be above 0"),
        (["--learning_rate", "fast"], "learning_rate.*fast"),
        (["--num_train_epochs", "1e400"], "num_train_epochs is inf, but must be a finite number"),
        (["--budget_hours", "soon"], "budget_hours.*: expected a number or null, got 'soon'$"),
        (["--max_steps", "1.5"], "max_steps.*: expected a whole number or null, got '1.5'$"),
        (["--learning_rate"], "learning_rate: expected one argument"),
        (["--min_learning_rate", "1"], "min_learning_rate 1.0 is above learning_rate 0.0003"),
        (["--lora.r", "0"], "lora.r is 0"),
        (["--lora.dropout", "1"], "lora.dropout is 1.0, but must be at least 0 and below 1"),
        (["--max_steps", "0"], "max_steps is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--name", "a/b"], "name is 'a/b', but must be a plain directory name"),
        (["--model.dtype", "float16"], "model.dtype.*'float32', 'bfloat16'.*float16"),
        (["--data.train_files", "[]"], "data.train_files is empty"),
        (["--data.start", "9", "--data.stop", "9"], "data.stop 9 is not above data.start 9"),
        (
            ["--data.train_files", "[a, b, a]"],
            "data.train_files names .*/a twice; give it a weight",
        ),
        (["--data.weights", "[1, 0]"], "data.weights is .*, but must be above 0 for each"),
        (["--data.max_drop", "1.1"], "data.max_drop is 1.1, but must be a share from 0 to 1"),
        (["--eval.top_p", "0"], "eval.top_p is 0.0"),
        (["--eval.top_p", "0.9"], "do nothing at eval.temperature 0"),
        (["--eval.temperature", "1e-38"], "must be 0, or from 1e-6 to 1e6"),
        (["--eval.top_k", "1", "--eval.temperature", "1"], "eval.top_k 1 makes .* useless"),
        (["--eval_steps", "5", "--data.eval_files", "[]"], "eval_steps needs data.eval_files"),
        (["--warmup_steps", "9", "--max_steps", "9"], "warmup_steps 9 is not below max_steps 9"),
        (["--eval.seed", str(2**32)], r"eval.seed is 4294967296, but must be .* below 2\^32"),
        (
            ["--global_batch_size", "6", "--gradient_accumulation_steps", "4"],
            "global_batch_size 6 is not a multiple of gradient_accumulation_steps 4",
        ),
        (["demo"], "unexpected argument 'demo'; options begin with --, as in --config demo"),
    ],
)
def test_bad_values_are_named(argv: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        parse("--learning_rate", "-1", "--lora.r", "0", "--eval.batch_size", "0")
    for name in ("learning_rate", "lora.r", "eval.batch_size"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "num_devices", "complaint"),
    [
        ({"global_batch_size": 12}, 8, "global_batch_size 12 .* nearest valid: 8, 16"),
        (
            {"global_batch_size": 24, "gradient_accumulation_steps": 2},
            8,
            "over 8 devices x 2 micro-batches; nearest valid: 16, 32",
        ),
        ({"fsdp": 3}, 8, r"fsdp 3 does not divide 8 devices; valid: \[1, 2, 4, 8\]"),
    ],
)
def test_batches_that_do_not_fit_the_devices(
    changes: dict[str, Any], num_devices: int, complaint: str
) -> None:
    config = dataclasses.replace(TrainConfig(), **changes)
    with pytest.raises(ValueError, match=complaint):
        check_devices(config, num_devices)


def test_batches_that_fit_the_devices() -> None:
    for num_devices, fsdp in ((1, 1), (8, 1), (8, 4), (8, 8)):
        check_devices(dataclasses.replace(TrainConfig(), fsdp=fsdp), num_devices)
    # Whatever eval.batch_size is: measuring makes it up.
    check_devices(parse("--config", "single_session", "--global_batch_size", "256"), 64)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Options that may be null."""

    model: str
    """A model."""
    prompt: str | None = "default"
    """A text."""
    base: bool = False
    """A switch."""


@pytest.mark.parametrize(
    "text",
    [
        *("# heading", "~", "Null", "a: b", "[1", "- x", "--- x", "--x y", "1e3", "true"),
        *('"', "\\n", "a\nb", "", " ", "naïve 🙂", "\x7f\x1b[0m", "{{x}}", "-1"),
    ],
)
def test_texts_are_taken_as_they_are(text: str) -> None:
    for argv in (["m", "--prompt", text, "--base"], ["m", f"--prompt={text}", "--base"]):
        (found,) = parse_options("x", "", argv, Texts)
        assert (found.prompt, found.base) == (text, True)
    assert parse_options("x", "", ["m", "--prompt", "null"], Texts)[0].prompt is None
    with pytest.raises(ValueError, match="prompt"):
        parse_options("jaxsft.x", "", ["m", "--prompt", "--base"], Texts)


@pytest.mark.parametrize("text", ["# Think.", "~", "Null", "a: b"])
def test_texts_are_taken_as_they_are_everywhere(text: str, tmp_path: Path) -> None:
    config, dumped = parse_config("jaxsft.train", "", ["--data.system_prompt", text])
    mine = {"data": {"train_files": "a.jsonl", "system_prompt": text}}
    (tmp_path / "kept.yaml").write_text(dumped)
    (tmp_path / "mine.yaml").write_text(json.dumps(mine))
    for file in ("kept.yaml", "mine.yaml"):
        again = parse("--config", str(tmp_path / file))
        assert again.data.system_prompt == config.data.system_prompt == text
    assert parse("--data.system_prompt", "null").data.system_prompt is None
    assert parse_options("x", "", ["m"], Texts, defaults={"prompt": text})[0].prompt == text


# An option of another trainer, and what must be said of it.
@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("per_device_train_batch_size", "--global_batch_size? It is per device × devices × grad"),
        ("micro-batch-size", "--global_batch_size? It is per device"),
        ("batch_size", "--global_batch_size? It counts the rows of an optimizer step, over all"),
        ("train.batch_size", "--global_batch_size?"),
        ("per_device_eval_batch_size", "--eval.batch_size? It counts the rows over all devices"),
        ("lr", "--learning_rate?"),
        ("optimizer.lr", "--learning_rate?"),
        ("warmup_ratio", "--warmup_steps? It is a number of steps: the ratio × the steps"),
        ("bf16", "--model.dtype? It is float32 or bfloat16."),
        ("gradient_checkpointing", "--model.remat? It is none, projections or full."),
        ("dataset_name", "--data.train_files?"),
        ("data.dataset_path", "--data.train_files?"),
        ("cutoff_len", "--data.max_length?"),
        ("lora_rank", "--lora.r?"),
        ("base_model", "--model.path?"),
        ("num-epochs", "--num_train_epochs?"),
        ("val_set_size", "not here, because held-out rows are files of their own: --data.eval_f"),
        ("report_to", "not here, because every run writes metrics.jsonl and TensorBoard events"),
        ("optim", "not here, because AdamW is the only optimizer"),
        ("model.load_in_4bit", "not here, because the frozen weights are float32 or bfloat16"),
        ("push_to_hub", "not here, because nothing is uploaded"),
        ("resume_from_checkpoint", "not here, because the same command again continues"),
        ("neftune_noise_alpha", "not here, because no noise is added"),
    ],
)
def test_options_of_other_trainers(theirs: str, said: str) -> None:
    assert said in hint_for(theirs, field_docs().keys())


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("num_generations", "--rollout.num_generations?"),
        ("num_iterations", "--objective.num_iterations?"),
        ("epsilon", "--objective.epsilon? --adam_epsilon is Adam's."),
        ("num_train_epochs", "--max_steps? It counts updates"),
        ("per_device_train_batch_size", "--rollout.num_prompts? A step learns from num_prompts ×"),
        ("max_completion_length", "--rollout.max_new_tokens?"),
        ("training_args.beta", "--objective.beta?"),
        ("reward_weights", "--rewards? It has names and weights"),
        ("top_k", "not here, because completions are drawn from the whole softmax"),
        ("vllm_server_host", "not here, because this program draws completions itself"),
        ("save_every", "--save_steps?"),
        ("load_in_4bit", "not here, because the frozen weights are"),
    ],
)
def test_options_of_other_trainers_in_grpo(theirs: str, said: str) -> None:
    assert said in hint_for(theirs, field_docs(GrpoConfig).keys())


def test_unknown_options_are_answered_wherever_they_stand(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("seed: 1\ntraining:\n  batch-size: 4\n")
    for argv, name in (
        (["--batch-size=4"], "batch_size"),
        (["--config", str(mine)], "training.bat"),
    ):
        with pytest.raises(ValueError, match=f"unknown option '{name}.*; did you mean --global_ba"):
            parse(*argv)


def test_what_is_suggested_exists() -> None:
    names = field_docs().keys() | {"search", "format"}
    assert hints._NOTES.keys() <= field_docs(GrpoConfig).keys()
    for renamed, absent, options in (
        (hints._RENAMED, hints._ABSENT, names),
        (grpo_hints.RENAMED, grpo_hints.ABSENT, field_docs(GrpoConfig).keys() | {"page"}),
    ):
        for _, option, _ in renamed:
            assert option.split("|")[0] in options | field_docs(GrpoConfig).keys()
        for text in [note for *_, note in renamed] + [why for _, why in absent]:
            assert {name.rstrip(".") for name in re.findall(r"--([\w.]+)", text)} <= options
        listed = [name for names, *_ in (*renamed, *absent) for name in names.split()]
        assert len(listed) == len({*listed}) and all(len(why) < 300 for _, why in absent)


@pytest.mark.parametrize(
    "name",
    [
        *("foo", "warmup_rate", "train_size", "eval.per_device_train_batch_size", "top_n"),
        *("max_learning_rat", "adam_beta3", "temprature_scale", "eval_loss", "lora.foo", "hash"),
    ],
)
def test_nothing_is_suggested_where_nothing_is_near(name: str) -> None:
    assert hint_for(name, field_docs().keys()) == ""


def test_every_unknown_option_is_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        parse("--lr", "1", "--foo", "--bf16=1", "--bar", "2", "--optim", "x", "--epochs", "2")
    found = str(error.value)
    assert re.search("'lr'.*'foo'; unknown option 'bf16'.*'bar'; and 2 more; --help", found)


def test_a_hint_is_for_the_command_that_was_asked() -> None:
    for options, said in (({"eval.batch_size"}, "--eval.batch_size?"), ({"seed"}, "--global")):
        assert said in hint_for("batch_size", options)
    assert "python -m jaxsft.train, --learning_rate" in hint_for("lr", {"model"})
    assert hint_for("max_tokens", {"max_new_tokens"}) == "did you mean --max_new_tokens?"
    assert "jaxsft.grpo, --objective.beta" in hint_for("beta", field_docs().keys())
    for command, kind, argv in (
        ("grpo", TrainConfig, ["--rollout.num_generations", "4"]),
        ("train", GrpoConfig, ["--data.overlong", "drop"]),
    ):
        recipe = "grpo_gsm8k" if kind is GrpoConfig else "demo"
        with pytest.raises(ValueError, match=f"an option of python -m jaxsft.{command}"):
            parse_options("x", "", ["--config", recipe, *argv], kind)


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    folders = {path.parent.name for path in Path(jaxsft.__file__).parent.glob("*/__main__.py")}
    assert folders == set(COMMANDS)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["generate", "--version"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxsft {jaxsft.__version__}\n" * 2
    assert main(["trian"]) == EXIT_BAD_INPUT
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxsft": "jaxsft.__main__:console_script"}
    assert project["version"] == jaxsft.__version__
