"""The settings that a plan tries: micro-batches, row length and remat near those of the config.

Every setting has the same number of tokens in an optimizer step: half the row length, twice the
rows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from jaxsft.config import TrainConfig
from jaxsft.gemma.model import REMAT_POLICIES

REMATS = tuple(REMAT_POLICIES)  # from the most memory to the least
MIN_ROW_LENGTH = 256


class TriedStep(Protocol):
    """What the search must know of the step that a setting makes."""

    @property
    def program_hash(self) -> str:
        """The hash by run.program.program_hash."""

    @property
    def fits(self) -> bool:
        """Does it fit the devices' memory?"""


Found = TypeVar("Found", bound=TriedStep)


class Setting(NamedTuple):
    """The options that the search changes."""

    accumulation_steps: int
    row_length: int
    remat: Any  # a key of REMAT_POLICIES

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """The config with this setting and the same number of tokens a step."""
        tokens = config.global_batch_size * config.data.max_length
        return dataclasses.replace(
            config,
            gradient_accumulation_steps=self.accumulation_steps,
            global_batch_size=tokens // self.row_length,
            data=dataclasses.replace(config.data, max_length=self.row_length),
            model=dataclasses.replace(config.model, remat=self.remat),
        )

    def takes_no_more_than(self, other: "Setting") -> bool:
        """Does this setting certainly need no more memory than `other`?"""
        return (
            self.row_length <= other.row_length
            and self.accumulation_steps >= other.accumulation_steps
            and REMATS.index(self.remat) >= REMATS.index(other.remat)
        )


def setting_of(config: TrainConfig) -> Setting:
    """The config's own setting."""
    return Setting(config.gradient_accumulation_steps, config.data.max_length, config.model.remat)


def all_settings(config: TrainConfig, num_devices: int, max_positions: int) -> list[Setting]:
    """The config's row length, half of it and twice it; micro-batches by powers of two, down to one
    row a device; every rematerialisation policy.

    The config's own setting is first, then those that take the least memory.
    """
    length = config.data.max_length
    tokens = config.global_batch_size * length
    found = []
    for row_length in (length // 2, length, length * 2):
        num_rows, rest = divmod(tokens, row_length)
        if not MIN_ROW_LENGTH <= row_length <= max_positions or rest or num_rows % num_devices:
            continue
        rows_per_device = num_rows // num_devices
        powers = [2**power for power in range(rows_per_device.bit_length())]
        counts = [count for count in reversed(powers) if rows_per_device % count == 0]
        found += [
            Setting(count, row_length, remat) for remat in reversed(REMATS) for count in counts
        ]
    own = setting_of(config)
    return [own, *(setting for setting in found if setting != own)]


def nearest_savings(config: TrainConfig, num_devices: int) -> list[Setting]:
    """Settings that take less memory than the config's own, the cheapest change first.

    More micro-batches cost little time, recomputation costs more. Shorter rows cut samples, so they
    come last, and with one row a device.
    """
    own = setting_of(config)
    candidates = all_settings(config, num_devices, own.row_length)
    one_row = max(s.accumulation_steps for s in candidates)

    def cost(setting: Setting) -> tuple[int, float]:
        remat = REMATS.index(setting.remat) - REMATS.index(own.remat)
        return 2 * remat, math.log2(setting.accumulation_steps / own.accumulation_steps)

    lesser = [s for s in candidates if s != own and s.takes_no_more_than(own)]
    same_length = [s for s in lesser if s.row_length == own.row_length]
    shorter = [
        s for s in lesser if s.row_length < own.row_length and s.accumulation_steps == one_row
    ]
    return [
        *sorted(same_length, key=lambda s: (sum(cost(s)), s.remat != own.remat)),
        *sorted(shorter, key=cost),
    ]


def try_settings(
    settings: Sequence[Setting], estimate: Callable[[Setting], Found]
) -> Iterator[tuple[Setting, Found | str]]:
    """Estimates one setting after the other; where there is no estimate, a text says why.

    A setting is not compiled if one that takes no more memory did not fit. A setting with the same
    program as an earlier one is left out.
    """
    too_large: list[Setting] = []
    programs: set[str] = set()
    for setting in settings:
        if any(other.takes_no_more_than(setting) for other in too_large):
            yield setting, "does not fit"
            continue
        try:
            found = estimate(setting)
        except ValueError as error:
            yield setting, str(error)
            continue
        if not found.fits:
            too_large.append(setting)
        if found.program_hash not in programs:
            programs.add(found.program_hash)
            yield setting, found


def nearest_fit(
    config: TrainConfig, num_devices: int, estimate: Callable[[Setting], Found]
) -> tuple[Setting, Found] | None:
    """The first of `nearest_savings` that fits; None where none does."""
    for setting, found in try_settings(nearest_savings(config, num_devices), estimate):
        if not isinstance(found, str) and found.fits:
            return setting, found
    return None
