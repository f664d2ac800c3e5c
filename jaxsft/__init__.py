"""Supervised fine-tuning of Gemma with LoRA, in pure JAX: `python -m jaxsft.train`."""

__version__ = "0.1.0"
