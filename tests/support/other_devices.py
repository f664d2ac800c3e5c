"""Runs a test file as a script, for other devices: JAX and libtpu read their environment once."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
COMPILE_FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # on the CPU: halves the time


def report_of(script: str, variables: Mapping[str, str]) -> Any:
    """The JSON that the script prints with these variables; no warning is let pass."""
    python_path = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    environment = {**os.environ, **variables, "PYTHONPATH": python_path}
    command = [sys.executable, "-W", "error", script]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)
