"""A resumable training loop: what step n does depends on the plan and n alone, never on when it was started.

A checkpoint holds the weights, their moving average, the optimizer's state, the step and the history. It is
written under a temporary name and renamed, so a killed run leaves the previous one. Randomness comes from
seeds of the step number.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaug.files import atomic_path
from diffaug.progress import Progress

History = list[dict[str, float]]


LONGEST_WARMUP = 200


def learning_rate_factor(step: int, steps: int, decay_fraction: float, fitted: bool = False) -> float:
    """Linear warm-up over a tenth of the run (at most 200 steps), constant, then a cosine to zero over its
    last `decay_fraction`.

    Args:
        fitted: whether the run begins from fitted weights. Then the warm-up takes 200 steps however short the
            run is: AdamW's first steps move each weight by the whole rate, whatever its gradient, and one
            such step took the label round trip of `hippocampus-mr` from a Dice of 0.98 to 0.86.
    """
    warmup = LONGEST_WARMUP if fitted else min(LONGEST_WARMUP, max(1, steps // 10))
    rising = min((step + 1) / warmup, 1.0)
    start = (1 - decay_fraction) * steps
    if step <= start or decay_fraction == 0:
        return rising
    return min(rising, 0.5 * (1 + math.cos(math.pi * (step - start) / max(steps - start, 1))))


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


class Trainer(Protocol):
    """What a training loop runs: steps, figures and a state that a checkpoint holds."""

    def step(self, step: int) -> dict[str, Tensor]:
        """Train on step n, whose randomness depends on n alone; the losses, "loss" among them."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out cases, "loss" among them."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class AveragedTrainer:
    """AdamW on one module, with a moving average of its weights.

    Args:
        loss: the losses of step n, under "loss" the one to minimise; must draw all randomness from n.
        evaluate: figures of a module that carries the averaged weights; "loss" among them.
        fitted: whether `module` begins from fitted weights: `learning_rate_factor`.
        snapshots: number of steps -> file that the averaged weights are kept in after them.
    """

    def __init__(
        self,
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
        fitted: bool = False,
        snapshots: Mapping[int, Path] | None = None,
    ) -> None:
        self.snapshots = snapshots or {}
        self.accelerator, self.module = accelerator, module
        self.loss, self.figures = loss, evaluate
        self.learning_rate = learning_rate
        self.factor = partial(learning_rate_factor, steps=steps, decay_fraction=decay_fraction, fitted=fitted)
        self.average = MovingAverage(module, ema)
        self.trained, self.optimizer = accelerator.prepare(
            module,
            torch.optim.AdamW(
                module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
            ),
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """One step of the optimizer."""
        self.module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.factor(step)
        with self.accelerator.autocast():
            losses = self.loss(self.trained, step)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(losses["loss"])
        self.accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.module, step)
        if step + 1 in self.snapshots and self.accelerator.is_main_process:
            with atomic_path(self.snapshots[step + 1]) as temporary:
                save_file({name: value.cpu() for name, value in self.average.values.items()}, temporary)
        return losses

    def evaluate(self) -> dict[str, float]:
        """Figures of the averaged weights; the module's own weights come back afterwards."""
        own = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.average.copy_to(self.module)
        self.module.eval()
        with torch.no_grad():
            figures = self.figures(self.module)
            for name, parameter in self.module.named_parameters():
                parameter.copy_(own[name])
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Weights, their average and the optimizer's state."""
        return {
            "module": self.module.state_dict(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average.values[name].copy_(value)


def run_loop(
    trainer: Trainer,
    *,
    accelerator: Accelerator,
    steps: int,
    evaluate_every: int,
    checkpoint_every: int,
    checkpoint: Path,
    progress: Progress,
    title: str,
) -> History:
    """Train for `steps` steps from the last checkpoint, or from the start where there is none.

    Args:
        checkpoint: file of the run's state. A finished run's file makes this return at once.
    """
    history: History = []
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        trainer.load_state_dict(state)
        history, start, spent = state["history"], state["step"], state.get("seconds", 0.0)
    began = time.monotonic()

    def save(step: int) -> None:
        if not accelerator.is_main_process:
            return
        state: dict[str, Any] = {
            "step": step,
            "seconds": spent + time.monotonic() - began,
            "history": history,
            **trainer.state_dict(),
        }
        with atomic_path(checkpoint) as temporary:
            torch.save(state, temporary)

    with progress.task(title, total=steps, completed=start) as task:
        for step in range(start, steps):
            losses = trainer.step(step)
            task.advance(loss=float(losses["loss"].detach()))
            done = step + 1
            if done % evaluate_every == 0 or done == steps:
                figures = trainer.evaluate()
                figures |= {f"training_{k}": float(v.detach()) for k, v in losses.items()}
                seconds = spent + time.monotonic() - began
                history.append({"step": float(done), "seconds": seconds, **figures})
                task.figure(figures["loss"])
            if done == steps or done % checkpoint_every == 0:
                save(done)
    return history
