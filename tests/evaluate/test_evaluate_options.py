"""Which models evaluate measures, and with which options, before any of them is loaded."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_run import make_run

from jaxsft.cli import parse_options
from jaxsft.config import ANSWER_TEMPLATE, SYSTEM_PROMPT
from jaxsft.evaluate import command
from jaxsft.evaluate.__main__ import main
from jaxsft.evaluate.options import EvaluateOptions
from jaxsft.evaluate.sides import Side, shared_tokenizer

TEXT = "Be brief."


def resolve(argv: Sequence[str]) -> tuple[EvaluateOptions, list[Side]]:
    def parse(defaults: Mapping[str, Any]) -> EvaluateOptions:
        (options,) = parse_options("x", "", argv, EvaluateOptions, defaults=defaults)
        return options

    return command.resolve(parse)


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose settings are no defaults, and which dropped what was too long."""
    directory = tmp_path_factory.mktemp("runs")
    rows = directory / "rows.jsonl"
    short, long = ({"question": "Add.", "answer": f"{'1 ' * n}\n#### 8"} for n in (9, 99))
    rows.write_text(json.dumps(short) + "\n" + json.dumps(long) + "\n")
    settings = {"system_prompt": TEXT, "max_length": "128", "overlong": "drop"}
    options = {f"data__{name}": value for name, value in settings.items()}
    options |= {"data__eval_files": str(rows), "eval__max_new_tokens": "7"}
    return str(make_run(directory / "run", tiny_model_dir, **options, model__dtype="bfloat16"))


@pytest.fixture
def changed(run_dir: str, tmp_path: Path) -> Callable[[str, str], str]:
    """A copy of the run, of which a line of the options is another one."""

    def copy(old: str, new: str) -> str:
        directory = Path(shutil.copytree(run_dir, tmp_path / "changed"))
        text = (directory / "config.yaml").read_text()
        assert text.count(old) == 1
        (directory / "config.yaml").write_text(text.replace(old, new))
        return str(directory)

    return copy


@pytest.fixture
def hub(run_dir: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been asked of a hub that has the run's adapter, and the model."""
    places = {"some/lora": Path(run_dir, "adapter"), "some/model": tiny_model_dir}
    asked: list[str] = []

    def fetch_model(repo: str, *_: Any, **__: Any) -> tuple[Path, str]:
        asked.append(repo)
        return places[repo], "0" * 40

    monkeypatch.setattr("jaxsft.weights.hub.fetch_model", fetch_model)
    return asked


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_run_gives_its_settings_from_either_side(run_dir: str, tiny_model_dir: Path) -> None:
    base = str(tiny_model_dir)
    options, sides = resolve([base, "--compare", run_dir])
    assert [side.name for side in sides] == [base, run_dir]
    assert (options.system_prompt, options.max_length, options.overlong) == (TEXT, 128, "drop")
    assert (options.dtype, options.param_dtype) == ("bfloat16", "float32")
    assert (
        options.eval.max_new_tokens == 7 and options.files == f"{Path(run_dir).parent}/rows.jsonl"
    )
    same = dataclasses.replace(options, model=run_dir, compare=base)
    assert resolve([run_dir, "--compare", base])[0] == same
    assert resolve([run_dir, "--compare", "base"])[0] == dataclasses.replace(same, compare="base")
    given = resolve([base, "--compare", run_dir, "--system_prompt", "null", "--max_length", "64"])
    assert (given[0].system_prompt, given[0].max_length) == (None, 64)
    rows = command.load_rows(options, shared_tokenizer(sides))  # of which one is left for the loss
    assert rows.heldout.num_samples == 1 and len(rows.prompts) == 2
    assert "1 row left out of the loss" in rows.about and f'system text "{TEXT}"' in rows.about
    none = command.load_rows(given[0], shared_tokenizer(sides))
    assert "system text" not in none.about


def test_one_dtype_is_for_weights_too(changed: Callable[[str, str], str]) -> None:
    run = changed("param_dtype: float32", "param_dtype: bfloat16")
    options, _ = resolve([run, "--dtype", "float32"])
    assert (options.dtype, options.param_dtype) == ("float32", None)


def test_two_runs_are_asked_with_one_system_text(
    run_dir: str, changed: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(f"system_prompt: {TEXT}", "system_prompt: Be long.")
    line = refused(capsys, run_dir, "--compare", other)
    assert f"{run_dir} and {other} were trained with different system texts" in line
    options, _ = resolve([run_dir, "--compare", other, "--system_prompt", SYSTEM_PROMPT])
    assert options.system_prompt == SYSTEM_PROMPT
    assert resolve([run_dir, "--compare", f"{run_dir}/adapter-best"])[0].system_prompt == TEXT


THINK = "<think>{reasoning}</think>{answer}"


def test_two_runs_of_different_forms_do_not_compare(
    run_dir: str, changed: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is measured with its own form; both with the same one if the options say so."""
    other = changed("earlier_reasoning: keep", "earlier_reasoning: strip")
    line = refused(capsys, run_dir, "--compare", other)
    assert "with different data.earlier_reasoning; evaluate each by itself, or give" in line
    config = Path(other, "config.yaml")
    form = yaml.safe_load(config.read_text())
    form["data"] |= {"answer_template": THINK, "earlier_reasoning": "keep"}
    config.write_text(yaml.safe_dump(form, sort_keys=False))
    assert resolve([other])[0].answer_template == THINK
    assert resolve([run_dir])[0].answer_template == ANSWER_TEMPLATE
    line = refused(capsys, run_dir, "--compare", other)
    assert "with different answer templates; evaluate each by itself, or give" in line
    options, _ = resolve([run_dir, "--compare", other, "--answer_template", THINK])
    assert options.answer_template == THINK
    for template, text, fault in (
        ("<a>{answer}", "Be brief.", "answer_template '<a>{answer}': must have {reasoning}"),
        (
            THINK,
            SYSTEM_PROMPT,
            "system_prompt asks for <reasoning>, which answer_template does not",
        ),
    ):
        given = ["--answer_template", template, "--system_prompt", text]
        assert f"error: {fault}" in refused(capsys, run_dir, *given)


def test_rows_are_read_and_shown_as_the_run_s_were(
    run_dir: str, changed: Callable[[str, str], str], tmp_path: Path
) -> None:
    run = changed("  columns: null", "  columns: {prompt: task, response: said, messages: chat}")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>A"}]
    rows = [{"task": "Why?", "said": "<think>So.</think>Yes", "prompt": "no"}, {"chat": 2 * chat}]
    files = tmp_path / "rows.jsonl"
    files.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--files", str(files), "--answer_template", THINK, "--earlier_reasoning", "strip"]
    options, sides = resolve([run, *given])
    tokenizer = shared_tokenizer(sides)
    first, second = command.load_rows(options, tokenizer).prompts
    assert (first.text, first.reference) == ("Why?", "<think>So.</think>Yes")
    assert "x" not in tokenizer.decode(second.ids)
    assert second.reference == "<think>x</think>A"


def test_an_export_is_asked_as_its_run_was(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = shutil.copytree(f"{run_dir}/adapter", tmp_path / "export")
    name = str(export)
    for text, expected in (("", None), (TEXT, TEXT)):
        (export / "manifest.json").write_text(json.dumps({"format": "peft", "system_prompt": text}))
        options, _ = resolve([name, "--files", "rows.jsonl"])
        assert (options.system_prompt, options.max_length) == (expected, 2048)
    for models in ([name, "--compare", run_dir], [run_dir, "--compare", name]):
        assert resolve(models)[0].max_length == 128  # the run says more
    (export / "manifest.json").write_text('{"format": "peft", "system_prompt": ""}')
    assert "with different system texts" in refused(capsys, name, "--compare", run_dir)


def test_an_adapter_of_the_hub(hub: list[str], run_dir: str, tiny_model_dir: Path) -> None:
    files = ["--files", "rows.jsonl"]
    _, (tuned, base) = resolve(["some/lora", "--compare", "base", *files])
    assert tuned.origin.adapter == Path(run_dir, "adapter") and base.origin.adapter is None
    assert tuned.origin.base == base.origin.base == tiny_model_dir
    # The base that is named is the adapter's alone.
    named = ["--base_model", str(tiny_model_dir)]
    for names in (["some/lora", "some/model"], ["some/model", "some/lora"]):
        _, sides = resolve([names[0], "--compare", names[1], *named, *files])
        is_named = {side.name: side.origin.is_named_base for side in sides}
        assert is_named == {"some/lora": True, "some/model": False}


def test_a_stray_adapter_config_is_no_adapter(
    run_dir: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path(shutil.copytree(tiny_model_dir, tmp_path / "whole"))
    shutil.copy(Path(run_dir, "adapter", "adapter_config.json"), whole)
    files = ("--files", "rows.jsonl")
    line = refused(capsys, str(whole), "--compare", "base", *files)
    assert f"{whole} has no adapter, it is the base itself" in line
    line = refused(capsys, str(whole), "--base_model", str(tiny_model_dir), *files)
    assert "base_model is for adapters and runs" in line
    line = refused(capsys, run_dir, "--compare", f"{run_dir}/adapter")
    assert "is the model itself" in line


def test_an_adapter_beside_its_base_has_another_name(
    run_dir: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(tiny_model_dir, tmp_path / "both"))
    shutil.copytree(Path(run_dir, "adapter"), both, dirs_exist_ok=True)
    config = both / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_model_dir), str(both)))
    _, sides = resolve([f"{both}/", "--compare", "base", "--files", "rows.jsonl"])
    assert [side.name for side in sides] == [f"{both}/", f"{both} (base)"]


def test_options_are_checked_before_a_download(
    hub: list[str], run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no rows to measure on" in refused(capsys, "some/model")
    for names in (["some/model", "--compare", run_dir], [run_dir, "--compare", "some/model"]):
        assert "eval.top_p is 2" in refused(capsys, *names, "--eval.top_p", "2")
    for name in ("files", "few_shot_files"):
        line = refused(capsys, run_dir, f"--{name}", "[rows.jsonl,./rows.jsonl]")
        assert line == f"error: {name} names {Path('rows.jsonl').resolve()} twice; name it once\n"
    assert hub == []
    assert "runs: no such file or directory" in refused(capsys, f"{run_dir}s")  # a slip is told
