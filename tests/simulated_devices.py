"""Eight devices simulated on the CPU, in a process of its own: XLA's are fixed when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


def report_of(script: str) -> Any:
    """The JSON that the script, a test file, prints there; no warning is let pass."""
    environment = {
        **os.environ,
        **EIGHT_DEVICES,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # halves the time to compile
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    command = [sys.executable, "-W", "error", script]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)
