"""A virtual environment for each peer: their pins conflict with one another and with ours.

`python -m benchmarks.peer_venvs NAME [DIRECTORY]` makes that of one peer and prints its Python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from jaxsft.common.files import cache_dir

DEFAULT_DIR = cache_dir("peers")

# Installed one list after the other. torch is exact and first, so that a CPU build, where pip is
# configured to find one, is what transformers and peft then meet.
REQUIREMENTS = {
    "torch": (
        ("torch==2.13.0",),
        ("transformers==5.23.0", "peft==0.21.2", "safetensors", "numpy"),
    ),
    # jax and libtpu as jaxsft has them: the same compiler for both.
    "tunix": (
        (
            *("google-tunix==0.1.7", "qwix==0.1.8", "flax==0.12.8", "optax==0.2.8"),
            *("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.42.1"),
        ),
    ),
    # For its preparation of data, which input_pipeline.py times beside ours.
    "trl": (
        ("torch==2.13.0",),
        (
            *("trl==1.16.0", "transformers==5.23.0", "tokenizers==0.23.3", "datasets==5.2.0"),
            *("sentencepiece==0.2.3", "protobuf==7.36.2", "jinja2"),  # read tokenizer.model
        ),
    ),
    # Its loader of checkpoints, for tests. With kauldron's own requirements, of which it imports a
    # few, pip finds no end; older JAX, because the last gemma for Python 3.11 needs this kauldron.
    "gemma": (
        (
            *("jax==0.8.1", "jaxlib==0.8.1", "flax==0.12.1", "orbax-checkpoint==0.11.30"),
            *("numpy==2.3.5", "etils[edc,enp,epath,epy,etree]", "einops", "jaxtyping"),
            *("typeguard==4.4.4", "sentencepiece", "treescope", "grain", "immutabledict", "clu"),
            *("ml_collections", "optax", "chex", "tqdm", "absl-py", "lark", "packaging", "pandas"),
            *("mediapy", "tensorboard", "tensorflow==2.21.0", "tensorflow_datasets==4.9.10"),
        ),
        ("--no-deps", "gemma==3.3.0", "kauldron==1.3.0"),
    ),
}
_STAMP = "jaxsft-peer.txt"


def ensure(
    name: str, requirements: tuple[tuple[str, ...], ...], directory: Path = DEFAULT_DIR
) -> Path:
    """The Python of the environment directory/name, made first unless it is there and complete.

    Raises ValueError when it cannot be made.
    """
    environment = directory / name
    stamp, python = environment / _STAMP, environment / "bin" / "python"
    wanted = "\n".join(" ".join(group) for group in requirements)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    # PYTHONPATH would let pip take what lies there for installed.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        if (environment / "pyvenv.cfg").exists():
            shutil.rmtree(environment)
        environment.mkdir(parents=True)
        commands = [[sys.executable, "-m", "venv", str(environment)]]
        commands += [[str(python), "-m", "pip", "install", "-q", *g] for g in requirements]
        for command in commands:
            subprocess.run(command, check=True, env=clean, stdout=sys.stderr)
        stamp.write_text(wanted, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"the environment {environment} cannot be made: {error}; --venvs DIR names another "
            "place, what pip printed says why packages do not install"
        ) from error
    return python


if __name__ == "__main__":
    print(ensure(sys.argv[1], REQUIREMENTS[sys.argv[1]], *map(Path, sys.argv[2:3])))
