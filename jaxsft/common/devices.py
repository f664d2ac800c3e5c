"""JAX's settings for a whole process; every command that computes makes them first."""

import os

import jax

from jaxsft.cli import cache_dir


def configure_jax() -> None:
    """float32 products in full, and compiled programs kept for the next process."""
    # float32 means float32 on accelerators too; their default is bfloat16 passes.
    jax.config.update("jax_default_matmul_precision", "highest")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a restart compiles nothing again
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("compiled")))
