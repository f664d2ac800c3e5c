"""The options of `python -m jaxsft.export`."""

import dataclasses
from typing import Literal

from jaxsft.config import Dtype


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of this command."""

    model: str
    """A run's directory, a PEFT adapter, or a base model (to convert it)."""
    format: Literal["peft", "merged", "flax"] = "merged"
    """The adapter for PEFT; a whole model for transformers; or Kaggle's Flax layout, with Tunix's
    LoRA-only one beside it."""
    output: str | None = None
    """New directory to write; by default exports/NAME-FORMAT. An earlier export of the same weights
    in the same format is replaced, nothing else is."""
    dtype: Dtype = "bfloat16"
    """How whole models are stored. An adapter alone is always float32."""
    max_shard_bytes: int = 2**30
    """Largest safetensors file of a merged model; a larger tensor has one of its own."""
    base_model: str | None = None
    """The model that the adapter belongs to, in place of the one that it names."""
    tokenizer: str | None = None
    """tokenizer.json, tokenizer.model or .gguf file, in place of the model's own."""
    peer_python: str | None = None
    """The Python in whose environment the library is that checks: transformers and PEFT, for flax
    Tunix. By default this one."""
    no_verify: bool = False
    """Leave out the check in the other library, and say so in the manifest."""
