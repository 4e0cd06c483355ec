"""The processes of a fit: accelerate's engine, and what the first of them decides for all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from diffaug.errors import DiffaugError
from diffaug.generators.hardware import has_bfloat16

T = TypeVar("T")

# How long processes wait for the first one, which alone reads the cases, encodes them and writes the report.
PATIENCE = timedelta(hours=24)


def make_accelerator(device: str | None = None) -> Accelerator:
    """Accelerate's engine: the GPU where there is one, bfloat16 where the hardware has it, DDP under
    torchrun.

    `device` "cpu" trains on the CPU whatever there is; other devices are chosen by accelerate's own rules.
    """
    cpu = device == "cpu"
    found = PartialState(cpu=cpu, timeout=PATIENCE).device
    try:
        asked = found if device is None else torch.device(device)
    except RuntimeError as error:
        raise DiffaugError(f"cannot use the device {device}: {error}") from error
    if asked.type != found.type:
        raise DiffaugError(f"device {device!r} was asked for, but accelerate found {found}")
    return Accelerator(cpu=cpu, mixed_precision="bf16" if has_bfloat16(found) else "no")


def decide(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, for all of them; its DiffaugError is raised in all.

    So no process waits for one that has failed, and none decides by its own clock.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = make()
        except DiffaugError as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
