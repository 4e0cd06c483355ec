"""A resumable training loop: what step n does depends on the plan and n alone, never on when it was started.

A checkpoint holds the weights, their moving average, the optimizer's state, the step and the history. It is
written under a temporary name and renamed, so a killed run leaves the previous one. Randomness comes from
seeds of the step number.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from diffaug.errors import DiffaugError
from diffaug.files import atomic_path
from diffaug.generators.hardware import has_bfloat16
from diffaug.progress import Progress

History = list[dict[str, float]]


def make_accelerator(device: str | None = None) -> Accelerator:
    """Accelerate's engine: the GPU where there is one, bfloat16 where the hardware has it, DDP under
    torchrun.

    `device` "cpu" trains on the CPU whatever there is; other devices are chosen by accelerate's own rules.
    """
    cpu = device == "cpu"
    found = PartialState(cpu=cpu).device
    try:
        asked = found if device is None else torch.device(device)
    except RuntimeError as error:
        raise DiffaugError(f"cannot use the device {device}: {error}") from error
    if asked.type != found.type:
        raise DiffaugError(f"device {device!r} was asked for, but accelerate found {found}")
    return Accelerator(cpu=cpu, mixed_precision="bf16" if has_bfloat16(found) else "no")


def learning_rate_factor(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """Linear warm-up, constant, then a cosine to zero over the last `decay_fraction` of the run."""
    if step < warmup:
        return (step + 1) / warmup
    start = (1 - decay_fraction) * steps
    if step <= start or decay_fraction == 0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(steps - start, 1)))


class MovingAverage:
    """Exponential moving average of a module's parameters, with a ramp so that early steps are forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.values)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            [self.values[n] for n in names], [parameters[n].detach() for n in names], 1 - decay
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged parameters into `module`."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def run_loop(
    *,
    accelerator: Accelerator,
    module: nn.Module,
    loss: Callable[[nn.Module, int], dict[str, Tensor]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    decay_fraction: float,
    ema: float,
    evaluate_every: int,
    checkpoint: Path,
    progress: Progress,
    title: str,
    checkpoint_every: int,
) -> tuple[MovingAverage, History]:
    """Train `module` for `steps` steps from the last checkpoint, or from the start where there is none.

    Args:
        loss: the losses of step n, under "loss" the one to minimise; must draw all randomness from n.
        evaluate: figures of a module that carries the averaged weights; "loss" among them.
        checkpoint: file of the run's state. A finished run's file makes this return at once.
    """
    average = MovingAverage(module, ema)
    trained, optimizer = accelerator.prepare(
        module,
        torch.optim.AdamW(
            module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        ),
    )
    history: History = []
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            average.values[name].copy_(value)
        history, start, spent = state["history"], state["step"], state.get("seconds", 0.0)
    began = time.monotonic()

    def save(step: int) -> None:
        if not accelerator.is_main_process:
            return
        state: dict[str, Any] = {
            "step": step,
            "seconds": spent + time.monotonic() - began,
            "module": module.state_dict(),
            "average": average.values,
            "optimizer": optimizer.state_dict(),
            "history": history,
        }
        with atomic_path(checkpoint) as temporary:
            torch.save(state, temporary)

    warmup = min(200, max(1, steps // 10))
    with progress.task(title, total=steps, completed=start) as task:
        for step in range(start, steps):
            module.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(step, steps, warmup, decay_fraction)
            with accelerator.autocast():
                losses = loss(trained, step)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            average.update(module, step)
            task.advance(loss=float(losses["loss"].detach()))
            done = step + 1
            if done % evaluate_every == 0 or done == steps:
                figures = _evaluate(module, average, evaluate)
                figures |= {f"training_{k}": float(v.detach()) for k, v in losses.items()}
                seconds = spent + time.monotonic() - began
                history.append({"step": float(done), "seconds": seconds, **figures})
                task.figure(figures["loss"])
            if done == steps or done % checkpoint_every == 0:
                save(done)
    return average, history


def _evaluate(
    module: nn.Module, average: MovingAverage, evaluate: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    """Figures of the averaged weights; the module's own weights come back afterwards."""
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    average.copy_to(module)
    module.eval()
    with torch.no_grad():
        figures = evaluate(module)
        for name, parameter in module.named_parameters():
            parameter.copy_(own[name])
    return figures
