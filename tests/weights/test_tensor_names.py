"""Names of tensors that wrappers have changed: what belongs together, and what does not."""

from pathlib import Path

import pytest

from jaxsft.weights.names import canonical_names

MODEL = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)] + ["model.norm.weight"]


def renamed(found: list[str]) -> dict[str, str]:
    return canonical_names(Path("model"), found, MODEL)


@pytest.mark.parametrize("prefix", ["base_model.model.", "module._orig_mod.", "actor."])
def test_a_whole_model_under_one_prefix_is_the_model(prefix: str) -> None:
    assert renamed([prefix + name for name in MODEL]) == {prefix + name: name for name in MODEL}


def test_the_text_part_of_a_model_that_sees() -> None:
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    text = [name.replace("model.", "model.language_model.", 1) for name in MODEL]
    assert renamed([*text, tower]) == dict(zip([*text, tower], [*MODEL, tower], strict=True))


def test_weights_of_two_models_are_never_mixed() -> None:
    copy = [f"ema.{name}" for name in MODEL]
    both = renamed([*MODEL, *copy])  # the copy stays as it is, and is refused as unexpected
    assert both == {name: name for name in (*MODEL, *copy)}
    for found in ([*copy, MODEL[2]], [*copy, *MODEL[:2]], [*copy[:2], MODEL[2]]):
        with pytest.raises(ValueError, match=r"tensors (are there twice|of several models)"):
            renamed(found)
