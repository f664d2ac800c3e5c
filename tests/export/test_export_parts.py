"""Parts of export that need no model: configs, the output directory, the model card."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxsft.cli import config_yaml, parse_options
from jaxsft.common.files import write_json
from jaxsft.config import ANSWER_TEMPLATE, GrpoConfig
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.export.card import about_training, model_card
from jaxsft.export.output import (
    check_replaceable,
    default_output,
    digests,
    export_scratch,
    put_in_place,
)
from jaxsft.export.verify import max_difference
from jaxsft.gemma.architecture import PRESETS
from jaxsft.weights.adapter_config import WEIGHTS_NAME, AdapterConfig
from jaxsft.weights.find import Origin, Taught, taught_by
from jaxsft.weights.inside import is_run


def test_largest_difference() -> None:
    one, other = np.array([[1.0, 2.0]]), np.array([[1.0, 2.5]])
    assert max_difference([one, one], [one, other]) == 0.5
    assert max_difference([one], [one[:, :1]]) == np.inf
    assert max_difference([one], [np.array([[1.0, np.nan]])]) == np.inf


def test_only_its_like_is_replaced(tmp_path: Path) -> None:
    output, model = tmp_path / "out", tmp_path / "out" / "model" / "d"
    identity = {"format": "peft", "base": {"digest": "a"}}
    check_replaceable(output, identity)
    model.parent.mkdir(parents=True)
    (output / "README.md").write_text("card")
    model.touch()
    with pytest.raises(ValueError, match="exists and is not an earlier peft export"):
        check_replaceable(output, identity)
    for files in (None, digests(output)):
        write_json(output / "manifest.json", identity | {"files": files})
        if files is None:
            with pytest.raises(ValueError, match="exists and is not an earlier peft export"):
                check_replaceable(output, identity)
    check_replaceable(output, identity)
    for other in ({"format": "merged"}, {"base": {"digest": "b"}}):
        with pytest.raises(ValueError, match="exists and is not an earlier"):
            check_replaceable(output, identity | other)
    (output / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"README\.md was changed after it was exported"):
        check_replaceable(output, identity)
    (output / "README.md").unlink()
    (model.parent / "mine").touch()
    with pytest.raises(ValueError, match="mine is not from the export"):
        check_replaceable(output, identity)


def test_an_earlier_one_stays_where_renaming_fails(tmp_path: Path) -> None:
    output, scratch = tmp_path / "out", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    (output / "first").touch()
    with pytest.raises(OSError):
        put_in_place(scratch / "missing", output)
    assert [path.name for path in output.iterdir()] == ["first"] and not list(scratch.iterdir())


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a@b" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a@b")
    for name in (".", "adapter", str(tmp_path / "a@b"), "../a@b/"):
        assert default_output(name, "peft") == Path("exports/a@b-peft")
    (tmp_path / "a@b" / "adapter-best").mkdir()
    assert default_output("adapter-best", "merged") == Path("exports/a@b-best-merged")
    assert default_output("google/gemma-2b@main", "flax") == Path("exports/gemma-2b-flax")


def test_directory_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "exports" / "out"
    with pytest.raises(KeyError), export_scratch(output, print) as scratch:
        (scratch / "half").touch()
        raise KeyError
    assert not list(output.parent.iterdir())
    for content in ("first", "second"):
        with export_scratch(output, print) as scratch:
            (scratch / "new").mkdir()
            (scratch / "new" / content).touch()
            put_in_place(scratch / "new", output)
        assert [path.name for path in output.iterdir()] == [content]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_what_a_killed_export_left(tmp_path: Path) -> None:
    """It is removed; what another export holds, or made for another name, stays."""
    output = tmp_path / "out"
    said: list[str] = []
    (tmp_path / ".out.partial-killed" / "new").mkdir(parents=True)
    (tmp_path / ".out-2.partial-other").mkdir()
    with export_scratch(output, said.append) as held:
        (held / "new").touch()
        with export_scratch(output, said.append):
            assert (held / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out-2.partial-other"]
    (line,) = said
    assert line.startswith(f"Removed {tmp_path / '.out.partial-killed'}, which a killed")

    # Killed after the earlier export was moved aside, before the new one took its place.
    for name in ("out", "out.drifting"):
        (tmp_path / ".out.partial-killed" / f"earlier-{name}").mkdir(parents=True)
        (tmp_path / ".out.partial-killed" / f"earlier-{name}" / name).touch()
    with export_scratch(output, said.append):
        for place in (output, tmp_path / "out.drifting"):
            assert [path.name for path in place.iterdir()] == [place.name]
    assert said[1].startswith(f"Put {output} back") and len(said) == 4


@pytest.mark.parametrize(
    ("name", "why"), [("file/out", "File exists"), ("x" * 250, "File name too long")]
)
def test_output_that_cannot_be(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=rf"cannot be written \({why}\): choose another"),
        export_scratch(tmp_path / name, print),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


THINK = "<think>{reasoning}</think>{answer}"


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        # Of an earlier version, which knew one form only.
        ('{"format": "merged", "system_prompt": " Think. "}', (" Think. ", None, "keep")),
        ('{"format": "merged", "system_prompt": ""}', ("", None, "keep")),
        (
            f'{{"format": "merged", "system_prompt": "", "answer_template": "{THINK}", '
            '"earlier_reasoning": "strip"}',
            ("", THINK, "strip"),
        ),
        (
            '{"format": "merged", "system_prompt": null, "answer_template": null, '
            '"earlier_reasoning": null}',
            None,
        ),
        ('{"format": "merged", "system_prompt": "", "answer_template": "x"}', None),
        ('{"format": "merged", "system_prompt": "", "earlier_reasoning": "x"}', None),
        ('{"format": "peft", "system_prompt": "an adapter\'s"}', None),
        ('{"format": "merged", "system_prompt": ["Think."]}', None),
        ('{"format": "merged", "system_prompt": "\\ud800"}', None),
        ("[]", None),
        (None, None),
    ],
)
def test_what_a_manifest_says_of_the_training(
    manifest: str | None, expected: tuple[str, str | None, Any] | None, tmp_path: Path
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest.encode("latin-1"))
    found = taught_by(Origin(tmp_path, None, None, tmp_path, "m", None))
    if expected is not None:
        system, form, earlier = expected
        template = AnswerTemplate() if form is None else AnswerTemplate(form)
        assert found == Taught(system, template, earlier)
    else:
        assert found is None


ADAPTER = AdapterConfig(8, 16.0, 0.0, True, ("q_proj", "v_proj"), None)


def card(
    format: str, name: str, preset: str, title: str = "out", base: str = "base", **changes: Any
) -> str:
    origin = Origin(Path(base), Path("adapter"), None, Path("t"), name, None)
    training = about_training(origin, ADAPTER)
    manifest = {
        "format": format,
        "verified": True,
        "problem": None,
        "not_checked": None,
        "max_abs_logit_difference": 2.5e-5,
        "bound": 2e-3,
        "peer": "transformers",
        "versions": {"jax": "0.10.2"},
        "peer_versions": {"transformers": "5.23.0"},
        "command": "python -m jaxsft.export adapter",
        "answer_template": None,
        "earlier_reasoning": None,
        "jaxsft": "0.1.0",
    }
    return model_card(origin, PRESETS[preset], training, manifest | changes, title)


def test_card() -> None:
    text = card("peft", "google/gemma-2-2b", "gemma-2-2b")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "license": "gemma",
        "library_name": "peft",
        "base_model": "google/gemma-2-2b",
        "pipeline_tag": "text-generation",
        "tags": ["gemma", "jax", "jaxsft", "lora", "sft"],
    }
    assert "rank 8, alpha 16 (alpha / sqrt(r)), dropout 0, on q_proj, v_proj" in text
    assert 'attn_implementation="eager"' in text and "PeftModel.from_pretrained(model" in text

    text = card("merged", "/home/me/models/gemma", "gemma-3-1b")
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert "made from `gemma`" in text and "/home/me" not in text
    assert "eager" not in text and "PeftModel" not in text
    unchecked = {"verified": False, "max_abs_logit_difference": None}
    assert "Not checked in another library" in card("flax", "demo", "gemma-3-1b", **unchecked)
    title = 'o"ut\\'
    assert 'path = "o\\"ut\\\\"\n' in card("merged", "demo", "gemma-2b", title)
    text = card("peft", "/home/me/gemma.gguf", "gemma-2b", base="/home/me/gemma.gguf")
    assert "jaxsft.export /path/to/gemma.gguf --format merged --output gemma.gguf-merged\n" in text
    assert 'from_pretrained("gemma.gguf-merged", ' in text and "/home/me" not in text
    demo = card("peft", "google/gemma-3-270m", "gemma-3-270m", base="/demo/gemma.gguf")
    assert 'from_pretrained("google/gemma-3-270m", ' in demo and "First export" not in demo


@pytest.mark.parametrize("form", [ANSWER_TEMPLATE, THINK, 'So "{reasoning}"\n\nIt is {answer}'])
def test_a_card_says_how_to_take_an_answer_apart(form: str) -> None:
    assert "## Answers" not in card("merged", "demo", "gemma-2b")
    taught = {"answer_template": form, "earlier_reasoning": "strip"}
    text = card("merged", "demo", "gemma-2b", **taught)
    for line in filter(None, form.splitlines()):
        assert f"    {line}\n" in text
    code = next(part for part in text.split("```python\n")[1:] if "re.fullmatch" in part)
    for answer, parts in (
        (AnswerTemplate(form).join("r\nr", "a\na"), ("r\nr", "a\na")),
        ("no form", (None, "no form")),
    ):
        names: dict[str, Any] = {"text": answer}
        exec(code.split("```")[0], names)
        assert (names["reasoning"], names["answer"]) == parts
    assert "is left out, as in training" in text
    kept = card("merged", "demo", "gemma-2b", **taught | {"earlier_reasoning": "keep"})
    assert "stays in the history, as in training" in kept


def test_card_of_a_run(tmp_path: Path) -> None:
    """Its last adapter has the measurements in training, and an evaluation if that is of it."""
    run_dir = tmp_path / "tuned"
    (run_dir / "evaluation").mkdir(parents=True)
    config = {
        "name": "tuned",
        "lora": {"r": 8},
        "data": {"train_files": ["a.jsonl"], "eval_files": ["/home/me/held.jsonl"]},
        "global_batch_size": 4,
        "fork_from": "/home/me/runs/first/adapter",
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    after = {"loss": 1.5, "intervals": {"loss": [1.25, 1.75]}, "num_answers": 16}
    write_json(run_dir / "result.json", {"before": {"loss": 2.0}, "after": after})
    estimates = [
        {"value": 0.0, "low": None, "high": None, "num": 200},
        {"value": 0.575, "low": 0.5057, "high": 0.6415, "num": 200},
    ]
    for which in ("adapter", "adapter-best", "start"):
        (run_dir / which).mkdir()
        (run_dir / which / WEIGHTS_NAME).write_text(which)
    digest = hashlib.sha256(b"adapter").hexdigest()
    numbers = {
        "models": ["demo", "runs/tuned"],
        "adapters": [None, digest],
        "about": "other.jsonl: 200 rows, 200 answers; greedy",
        "metrics": {"exact_format": {"models": estimates}, "unheard_of": {"models": estimates}},
    }
    write_json(run_dir / "evaluation" / "evaluation.json", numbers)

    def about(which: str) -> str:
        origin = Origin(Path("b"), run_dir / which, run_dir, Path("t"), "demo", None)
        return "\n".join(about_training(origin, ADAPTER))

    text = about("adapter")
    assert "on the held-out rows (`held.jsonl`; 16 answers):" in text and "/home/me" not in text
    assert "| held-out loss, nats per completion token | 2.0000 | 1.5000 [1.2500, 1.7500] |" in text
    assert "`python -m jaxsft.evaluate`, on other.jsonl: 200 rows, 200 answers; greedy:" in text
    assert "|  | `demo` | this model |\n|---|---|---|\n" in text
    assert "| exact format | 0.0% | 57.5% [50.6, 64.1] |" in text
    assert "- went on from the adapter of `first`" in text
    assert "- rows whose answer has no reasoning: trained without the system prompt" in text
    numbers |= {"adapters": ["of another", digest]}  # trained further between the two
    write_json(run_dir / "evaluation" / "evaluation.json", numbers | {"models": ["tuned"] * 2})
    assert "|  | `tuned` | this model |" in about("adapter")
    best, start = about("adapter-best"), about("start")
    assert "## Results" not in best + start
    assert "- of the steps below, the one with the lowest held-out loss" in best
    assert "- what the run `tuned` began with" in start and "steps" not in start
    (run_dir / "adapter" / WEIGHTS_NAME).write_text("trained further")
    assert "jaxsft.evaluate" not in about("adapter")
    (run_dir / "evaluation" / "evaluation.json").write_text('{"models": ["tuned"]}')
    with pytest.raises(ValueError, match=r"evaluation\.json: is no evaluation"):
        about("adapter")


def test_card_of_a_run_of_grpo(tmp_path: Path) -> None:
    (config,) = parse_options("jaxsft.grpo", "", ["--config", "grpo_gsm8k"], GrpoConfig)
    run_dir, adapter = tmp_path / "rewarded", tmp_path / "rewarded" / "adapter-best"
    adapter.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config_yaml(config))
    assert is_run(run_dir)
    (adapter / WEIGHTS_NAME).write_text("best")
    (run_dir / "evaluation").mkdir()
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "num": 16}
    numbers = {
        "models": ["runs/rewarded"],
        "adapters": [hashlib.sha256(b"best").hexdigest()],
        "about": "mbpp: 16 answers",
        "metrics": {name: {"models": [estimate]} for name in ("tests_passed", "reward_tests")},
    }
    write_json(run_dir / "evaluation" / "evaluation.json", numbers)
    origin = Origin(Path("b"), adapter, run_dir, Path("t"), "demo", None)
    text = "\n".join(about_training(origin, ADAPTER))
    assert "- of the steps below, the one with the highest held-out reward" in text
    assert "- GRPO: 0 steps on rollouts of 16 prompts x 8 completions" in text
    assert "rewards: format 0.2, answer 1, tests 1" in text
    assert "| all tests passed | 50.0% [25.0, 75.0] |\n| reward tests | 0.500 [" in text
    taught = taught_by(origin)
    assert taught is not None and taught.earlier_reasoning == "keep"
