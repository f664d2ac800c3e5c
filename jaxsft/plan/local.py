"""Plans a run on this machine's devices: the program that train would run, and its memory."""

from typing import Any, NamedTuple

import jax
from rich.console import Console

from jaxsft.config import TrainConfig
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.plan.chips import GIB
from jaxsft.plan.report import HASH_OF_GUESSED_STEPS, NOTHING_FITS, describe_setting
from jaxsft.plan.search import Setting, nearest_fit
from jaxsft.plan.tpu_aot import OutOfMemory, compile_or_refuse
from jaxsft.run.out_of_memory import free_memory
from jaxsft.run.program import abstract_setup, lower_step, program_hash
from jaxsft.weights.find import architecture


class LocalStep(NamedTuple):
    """A train step compiled for this machine's devices.

    Bytes are those of one device; CPUs share one memory, there they are those of all devices.
    `available_bytes` is None where the devices do not report it.
    """

    program_hash: str
    formulation: str  # fused or plain
    needed_bytes: int
    available_bytes: int | None

    @property
    def fits(self) -> bool:
        """Is there enough memory? True also where the amount is not known."""
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes

    @property
    def memory(self) -> str:
        """Needed and available memory as text."""
        needed = f"{self.needed_bytes / GIB:.2f}"
        if self.available_bytes is None:
            return f"{needed} GiB; the devices do not tell how much they have"
        return f"{needed} of {self.available_bytes / GIB:.2f} GiB"


def compile_local(config: TrainConfig, model_config: GemmaConfig, steps: int) -> LocalStep:
    """Compiles the step of a run of `steps` steps; nothing is run.

    Raises ValueError for a config that the devices cannot run, CompilerError where XLA fails.
    """
    devices = jax.devices()
    arguments = abstract_setup(config, model_config, devices, steps)
    lowered = lower_step(arguments)
    compiled = compile_or_refuse(lowered, "the compiler")
    available: int | None
    if isinstance(compiled, OutOfMemory):
        needed, available = compiled.needed_bytes, compiled.available_bytes
    else:
        shares_memory = devices[0].platform == "cpu"
        needed = step_bytes(compiled, devices[0].platform) * (len(devices) if shares_memory else 1)
        # After compiling: what XLA keeps is not free for training either.
        available = free_memory(jax.local_devices())
    formulation = "plain" if arguments.spec.model.fused is None else "fused"
    return LocalStep(program_hash(lowered), formulation, needed, available)


def step_bytes(compiled: jax.stages.Compiled, platform: str) -> int:
    """Bytes on one device for arguments, results and temporaries of the step, as XLA counts."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    code = analysis.generated_code_size_in_bytes
    if platform == "tpu":
        return analysis.peak_memory_in_bytes + code
    # Not the peak: on CPUs it leaves out temporaries, 1.2 GiB where the demo's step takes 2.7.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes + code


def plan_devices(
    config: TrainConfig, steps: int | None, *, steps_are_exact: bool, console: Console
) -> dict[str, Any]:
    """Shows hash and memory of the step and, if it does not fit, the nearest setting that does.

    Returns the same as JSON values, units in the names. Raises as compile_local.
    """
    model_config, source = architecture(config.model.path)
    num_devices = jax.device_count()

    def compiled(setting: Setting | None) -> LocalStep:
        changed = config if setting is None else setting.applied_to(config)
        with console.status("Compiling …"):
            found = compile_local(changed, model_config, steps or config.warmup_steps + 1)
        if setting is not None:
            console.print(f"{describe_setting(setting, config)}: {found.memory}")
        return found

    found = compiled(None)
    console.print(f"{config.name}: {model_config.name} ({source}) on {num_devices} local devices")
    console.print(f"train step: {found.formulation}, program {found.program_hash}")
    verdict = "fits" if found.fits else "DOES NOT FIT"
    console.print(f"memory: {verdict}, {found.memory}, by XLA's count, without loading the model")
    if not steps_are_exact:
        console.print(HASH_OF_GUESSED_STEPS)
    values: dict[str, Any] = {"num_chips": num_devices, "steps": steps}
    values |= {"steps_are_exact": steps_are_exact, "fits": found.fits} | found._asdict()
    if found.fits:
        return values
    values["nearest"] = None
    if (nearest := nearest_fit(config, num_devices, compiled)) is None:
        console.print(NOTHING_FITS)
        return values
    setting, step = nearest
    options = describe_setting(setting, config)
    console.print(f"The nearest setting that fits: {options} ({step.memory}).")
    values["nearest"] = setting._asdict() | {"options": options, "gib": step.needed_bytes / GIB}
    return values
