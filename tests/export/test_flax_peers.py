"""What we write as Flax checkpoints, `gemma` and Tunix load, each with its own loader and model.

A virtual environment each; `benchmarks.peer_venvs` makes them, with pip, on the first run.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.lora_twins import clone, inject_random
from support.twins import TWINS, make_twin, our_logits, to_jax

from jaxsft.common.files import cache_dir
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.__main__ import main
from jaxsft.export.verify import LOGIT_BOUND
from jaxsft.gemma.model import Gemma
from jaxsft.weights import tunix as tunix_io
from jaxsft.weights.flax import FlaxTensor, write_flax
from jaxsft.weights.load import hf_tensors, load_model
from jaxsft.weights.peft import save_adapter
from jaxsft.weights.tunix import write_tunix_lora

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}
# The peers know no query scale but head_dim^-0.5.
PEER_SCALE = {"gemma1": {}} | {name: {"query_pre_attn_scalar": 16} for name in TWINS[1:]}
ENVIRONMENTS = cache_dir("peers")  # the user's: tests have a cache of their own
PROMPTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Question: What is 12 times 12? Answer: 144. Question: What is 9 times 9? Answer: 81.",
    "import numpy as np\n\ndef mean(values):\n    return sum(values) / len(values)\n\ndef var(",
]

GEMMA_WORKER = """
import json, sys
import jax.numpy as jnp
import numpy as np
from gemma import gm
from gemma.gm.nn import _config, _modules, _transformer

kinds = {"local": _modules.AttentionType.LOCAL_SLIDING, "global": _modules.AttentionType.GLOBAL}
for job in json.load(open(sys.argv[1])):
    c = job["config"]
    config = _config.TransformerConfig(
        num_embed=c["vocab_size"] + (0 if c["qk_norm"] else 128),
        embed_dim=c["d_model"], hidden_dim=c["d_ff"], num_heads=c["num_heads"],
        head_dim=c["head_dim"], num_kv_heads=c["num_kv_heads"],
        final_logit_softcap=c["final_softcap"], attn_logits_soft_cap=c["attn_softcap"],
        use_post_attn_norm=c["post_norms"], use_post_ffw_norm=c["post_norms"],
        attention_types=tuple(kinds[kind] for kind in c["layer_types"]),
        sliding_window_size=c["sliding_window"], transpose_gating_einsum=c["qk_norm"],
        use_qk_norm=c["qk_norm"], local_base_frequency=c["rope_theta_local"],
        global_base_frequency=c["rope_theta_global"],
    )
    if job["preset"]:
        assert config == gm.nn.Gemma3_270M.config
    params = gm.ckpts.load_params(job["checkpoint"])
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    logits = model.apply({"params": params}, tokens=jnp.array(np.load(job["tokens"]))).logits
    np.save(job["logits"], logits)
    gm.ckpts.save_params(params, job["resaved"], wait_until_finished=True)
"""

TUNIX_WORKER = """
import json, sys
import jax, jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from orbax import checkpoint as ocp
from tunix.sft.checkpoint_manager import CheckpointManager

sys.path.insert(0, sys.argv[2])
import tunix_worker

for job in json.load(open(sys.argv[1])):
    is_gemma3 = job["config"]["qk_norm"]
    load = tunix_worker._gemma3 if is_gemma3 else tunix_worker._gemma
    model = load(job["checkpoint"], job["config"])
    tokens = jnp.array(np.load(job["tokens"]))
    def logits(model):
        rows, length = tokens.shape
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        return model(tokens, positions, None, mask)[0]

    np.save(job["logits"], logits(model))
    for adapter in job["adapters"]:
        provider = qwix.LoraProvider(**adapter["settings"])
        tuned = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        manager = CheckpointManager(adapter["checkpoint"], ocp.CheckpointManagerOptions())
        assert manager.maybe_restore(tuned, restore_only_lora_params=True) == (
            0, adapter["settings"])
        manager.close()
        np.save(adapter["logits"], logits(tuned))
        # As Tunix's notebooks do it.
        again = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.state(again, nnx.LoRAParam))
        nnx.update(again, ocp.StandardCheckpointer().restore(
            adapter["checkpoint"] + "/0/model_params", target=wanted))
        np.testing.assert_array_equal(logits(again), logits(tuned))
"""


def peer_python(peer: str) -> str:
    """The Python of the environment of `peer`."""
    command = [sys.executable, "-m", "benchmarks.peer_venvs", peer, str(ENVIRONMENTS)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout.strip()


def run_worker(peer: str, program: str, jobs: list[dict[str, Any]], directory: Path) -> None:
    """Runs `program` in the environment of `peer`, with a file of `jobs`."""
    jobs_file = directory / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    result = subprocess.run(
        [peer_python(peer), "-c", program, str(jobs_file), str(ROOT / "jaxsft/export")],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]


class Case:
    """A model, its Flax checkpoint, its logits, and the job that makes a peer compute theirs."""

    def __init__(self, model: Gemma, tokens: np.ndarray, directory: Path, *, preset: bool = False):
        directory.mkdir(parents=True)
        self.model, self.tokens, self.directory = model, tokens, directory
        write_flax(directory / "checkpoint", hf_tensors(model), model.config)
        np.save(directory / "tokens.npy", tokens)
        self.job: dict[str, Any] = {
            "config": dataclasses.asdict(model.config),
            "preset": preset,
            "checkpoint": str(directory / "checkpoint"),
            "tokens": str(directory / "tokens.npy"),
            "logits": str(directory / "logits.npy"),
            "resaved": str(directory / "resaved"),
            "adapters": [],
        }
        self.adapted: list[Gemma] = []

    def add_adapter(self, targets: str, *, use_rslora: bool) -> None:
        adapted = clone(self.model)
        config = inject_random(adapted, targets, use_rslora)
        directory = self.directory / f"adapter{len(self.adapted)}"
        settings = write_tunix_lora(directory, adapted, config)
        self.adapted.append(adapted)
        logits = str(directory.with_suffix(".npy"))
        job = {"settings": settings, "checkpoint": str(directory), "logits": logits}
        self.job["adapters"].append(job)

    def check(self, bound: float) -> None:
        """Their logits, on the vocabulary's tokens, are ours, of the adapters too."""
        models = [self.model, *self.adapted]
        files = [self.job["logits"], *(adapter["logits"] for adapter in self.job["adapters"])]
        for model, file in zip(models, files, strict=True):
            ours, theirs = our_logits(model, self.tokens), np.load(file)
            num_tokens = ours.shape[-1]
            assert np.abs(ours - theirs[..., :num_tokens]).max() <= bound, file
            if theirs.shape[-1] > num_tokens:
                # No token of the padding is ever likelier than <pad>.
                assert theirs.shape[-1] == num_tokens + 128
                np.testing.assert_allclose(
                    theirs[..., num_tokens:], theirs[..., :1].repeat(128, -1), atol=1e-5
                )


def tiny_cases(directory: Path) -> list[Case]:
    tokens = np.random.default_rng(0).integers(1, 256, (2, 24))
    cases = []
    for name in TWINS:
        hf_model, _ = make_twin(name, **PEER_SCALE[name])
        cases.append(Case(to_jax(hf_model, directory / name), tokens, directory / name / "flax"))
        hf_model.config.save_pretrained(directory / name / "flax" / "config")
    return cases


def real_case(model: Gemma, tokenizer: Tokenizer, directory: Path) -> Case:
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)][:12] for prompt in PROMPTS]
    return Case(model, np.array(rows), directory / "real", preset=True)


def test_gemma_package(real_model: Gemma, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny, real = tiny_cases(tmp_path), real_case(real_model, tokenizer, tmp_path)
    run_worker("gemma", GEMMA_WORKER, [case.job for case in [*tiny, real]], tmp_path)
    for case in tiny:
        case.check(1e-4)
        # And in: what gemma itself writes, as a tree of other keys.
        resaved = Path(case.job["resaved"])
        config = case.directory / "config" / "config.json"
        (resaved / "config.json").write_bytes(config.read_bytes())
        assert_equal_weights(load_model(resaved, **FLOAT32)[0], case.model)
    real.check(2e-3)
    loaded, info = load_model(real.job["resaved"], **FLOAT32)
    assert (info.format, info.config.name) == ("flax", "gemma-3-270m")
    assert_equal_weights(loaded, real_model)


def test_tunix(real_model: Gemma, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny, real = tiny_cases(tmp_path), real_case(real_model, tokenizer, tmp_path)
    for case in tiny:
        case.add_adapter("all-linear", use_rslora=True)
        case.add_adapter("q_proj,v_proj", use_rslora=False)
        assert [a["settings"]["rank"] for a in case.job["adapters"]] == [6, 3]
        assert case.job["adapters"][1]["settings"]["alpha"] == 7.0
    real.add_adapter("all-linear", use_rslora=False)
    run_worker("tunix", TUNIX_WORKER, [case.job for case in [*tiny, real]], tmp_path)
    for case in tiny:
        case.check(1e-4)
    real.check(2e-3)


def assert_equal_weights(model: Gemma, expected: Gemma) -> None:
    for (name, array), (_, other) in zip(hf_tensors(model), hf_tensors(expected), strict=True):
        np.testing.assert_array_equal(array, other, err_msg=name)


@pytest.fixture(scope="module")
def exportable(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny bases with a tokenizer, "gemma1" to "gemma3-1b", and an adapter of each,
    "gemma1-adapter" and so on."""
    root = tmp_path_factory.mktemp("exportable")
    tokenizer = tiny_model_dir / "tokenizer.model"
    sizes = {"vocab_size": Tokenizer.from_file(tokenizer).vocab_size}
    sizes |= {"max_position_embeddings": 512}
    for name in TWINS:
        hf_model, _ = make_twin(name, **sizes, **PEER_SCALE[name])
        hf_model.save_pretrained(root / name)
        shutil.copy(tokenizer, root / name)
        model, _ = load_model(root / name, **FLOAT32)
        config = dataclasses.replace(inject_random(model), base_model_name=str(root / name))
        save_adapter(root / f"{name}-adapter", model, config)
    return root


def exported(
    exportable: Path, name: str, output: Path, *options: str
) -> tuple[int, dict[str, Any]]:
    """(exit code, manifest) of the command with Tunix's Python, for the adapter of `name`."""
    command = [str(exportable / f"{name}-adapter"), "--format=flax", *options]
    code = main([*command, "--peer-python", peer_python("tunix"), "--output", str(output)])
    written = output if code == 0 else output.with_name(f"{output.name}.drifting")
    return code, json.loads((written / "manifest.json").read_text())


@pytest.mark.parametrize("name", TWINS)
def test_tunix_verifies_an_export(name: str, exportable: Path, tmp_path: Path) -> None:
    dtype = "bfloat16" if name == "gemma2" else "float32"
    code, manifest = exported(exportable, name, tmp_path / "out", f"--dtype={dtype}")
    assert code == 0 and manifest["verified"] and manifest["not_checked"] is None
    assert manifest["peer"] == "Tunix" and 0 < manifest["max_abs_logit_difference"] <= 1e-4
    assert manifest["peer_versions"]["google-tunix"] == "0.1.7"
    files = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*")}
    assert manifest["files"].keys() <= files  # Tunix wrote nothing there


@pytest.mark.parametrize("part", ["model/", "the base and tunix-lora/"])
def test_tunix_finds_damage(
    part: str,
    exportable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The faults: the last norm's scale is a tenth larger; B of one matrix is."""
    if part == "model/":
        from_hf = FlaxTensor.from_hf

        def damaged(tensor: FlaxTensor, array: np.ndarray) -> np.ndarray:
            return from_hf(tensor, array) * (1.1 if tensor.name == "final_norm/scale" else 1.0)

        monkeypatch.setattr(FlaxTensor, "from_hf", damaged)
    else:
        combine = tunix_io._combine

        def damaged_lora(matrix: Any, *rest: Any) -> tuple[np.ndarray, np.ndarray]:
            a, b = combine(matrix, *rest)
            return a, b * (1.1 if matrix.targets == ("down_proj",) else 1.0)

        monkeypatch.setattr(tunix_io, "_combine", damaged_lora)
    code, manifest = exported(exportable, "gemma3-1b", tmp_path / "out", "--dtype=float32")
    assert code == 1 and not manifest["verified"]
    assert f"the export drifts: logits of Tunix, from {part}, are" in manifest["problem"]
    assert manifest["max_abs_logit_difference"] > 10 * LOGIT_BOUND
    assert manifest["problem"] in capsys.readouterr().err
