"""A pretraining, from its plan to a folder of weights: resumable, with held-out losses and a record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffaug.datasets.manifest import differences, versions
from diffaug.errors import DiffaugError
from diffaug.files import PRIVATE, atomic_path, atomic_write_json
from diffaug.generators.seeds import case_seed
from diffaug.pretraining.handoff import kept, write_handoffs
from diffaug.pretraining.loading import tensors
from diffaug.pretraining.plan import PLAN, DatasetSource, PretrainingPlan, Stage, read_plan
from diffaug.pretraining.sources import Mixed, Streamed
from diffaug.pretraining.stages import hand_over, objective, trained_network
from diffaug.progress import Progress
from diffaug.segmentation.cases import CLIPPED, Prepared, Window
from diffaug.segmentation.patches import Listed, Patches, Source
from diffaug.segmentation.training import Objective, finite
from diffaug.training.loop import AveragedTrainer, History, run_loop
from diffaug.training.processes import decide
from diffaug.training.report import draw_curves

WEIGHTS, RECORD, CURVES = "weights.safetensors", "pretraining.json", "curves.png"
# Batches of the held-out loss.
EVALUATED = 8
EVALUATIONS, CHECKPOINTS = 10, 20


@dataclass(frozen=True)
class Material:
    """What the sources of a plan hold, in their order: cases, or the stream of a generator.

    Attributes:
        training: of each source.
        held_out: cases of patients, or samples, that none of these shows.
    """

    training: Sequence[Sequence[Prepared] | Streamed]
    held_out: Sequence[Prepared]


def pretrain(
    plan: PretrainingPlan,
    material: Material,
    output: Path,
    accelerator: Accelerator,
    progress: Progress,
) -> Path:
    """Pretrain a network, or go on where an earlier call stopped.

    Writes `weights.safetensors`, `plan.json`, `pretraining.json` (what it was made of, held-out losses),
    `curves.png`, and what other libraries load; `private` holds checkpoints.

    Args:
        output: new, empty, or what an earlier call with the same plan left.

    Returns:
        The file of the weights.

    Raises:
        DiffaugError: the output holds something else.
    """

    def begin() -> None:
        check_output(plan, output)
        (output / PRIVATE).mkdir(parents=True, exist_ok=True)
        if not (output / PLAN).exists():
            atomic_write_json(output / PLAN, plan.model_dump(mode="json"))

    decide(accelerator, begin)
    weights: dict[str, Tensor] = {}
    histories: dict[str, History] = {}
    for number, stage in enumerate(plan.stages):
        title = stage.method if len(plan.stages) == 1 else f"{number + 1} {stage.method}"
        network = _network(plan, number, weights)
        histories[title] = _run(plan, number, network, material, output, accelerator, progress, title)
        weights = {name: value.detach().cpu().contiguous() for name, value in tensors(network).items()}
    if accelerator.is_main_process:
        draw_curves(histories, output / CURVES)
        atomic_write_json(output / RECORD, _record(plan, histories))
        write_handoffs(plan, network, output)
        with atomic_path(output / WEIGHTS) as temporary:
            save_file({name: value for name, value in weights.items() if kept(plan, name)}, temporary)
    accelerator.wait_for_everyone()
    return output / WEIGHTS


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The weights of a pretraining, by the names of the network's parameters.

    Raises:
        DiffaugError: the folder holds none.
    """
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise DiffaugError(f"{file} does not exist: run `diffaug pretrain` to its end")
    return load_file(file)


def check_output(plan: PretrainingPlan, output: Path) -> None:
    """Refuse a folder that holds something else than this plan's pretraining.

    Raises:
        DiffaugError: it does.
    """
    if (output / PLAN).exists():
        old = read_plan(output / PLAN).model_dump(mode="json")
        if changed := differences(old, plan.model_dump(mode="json")):
            raise DiffaugError(
                f"{output} holds another pretraining ({'; '.join(changed[:3])}): give another output"
            )
    elif output.exists() and any(output.iterdir()):
        raise DiffaugError(f"{output} is not empty and holds no pretraining: give another output")


def _network(plan: PretrainingPlan, number: int, weights: dict[str, Tensor]) -> nn.Module:
    """The network of a stage, filled with what the one before left."""
    stage = plan.stages[number]
    network = trained_network(stage.method, plan.network, plan.channels, len(plan.labels), plan.seed)
    if number > 0:
        hand_over(network, plan.network, weights, plan.stages[number - 1].method, stage.method)
    return network


def _run(
    plan: PretrainingPlan,
    number: int,
    network: nn.Module,
    material: Material,
    output: Path,
    accelerator: Accelerator,
    progress: Progress,
    title: str,
) -> History:
    """Train one stage to its end."""
    stage = plan.stages[number]
    schedule = stage.schedule
    seed = case_seed(case_seed(plan.seed, number), accelerator.process_index)
    aim = _objective(plan, stage, _source(plan, stage, material, seed), seed)
    held_out = None
    if shown := usable(material.held_out, stage):
        seen = stage.model_copy(update={"schedule": schedule.model_copy(update={"augmentation": False})})
        # Equal patches at every evaluation, in every process.
        held_out = _objective(plan, seen, Listed(shown, plan.seed), plan.seed)
    trainer = AveragedTrainer(
        accelerator=accelerator,
        module=network,
        loss=partial(_losses, aim),
        evaluate=partial(_evaluate, held_out),
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        weight_decay=1e-2,
        decay_fraction=0.9,
        ema=0.0,
    )
    return run_loop(
        trainer,
        accelerator=accelerator,
        steps=schedule.steps,
        evaluate_every=max(1, schedule.steps // EVALUATIONS),
        checkpoint_every=max(1, schedule.steps // CHECKPOINTS),
        checkpoint=output / PRIVATE / f"stage-{number}.pt",
        progress=progress,
        title=title,
    )


def _objective(plan: PretrainingPlan, stage: Stage, source: Source, seed: int) -> Objective:
    patches = Patches(source, plan.space.patch, stage.schedule.batch, seed)
    return objective(stage.method, patches, len(plan.labels), stage.schedule)


def usable(cases: Sequence[Prepared], stage: Stage) -> list[Prepared]:
    """The cases from which a stage learns: all, or those with a label map."""
    return [case for case in cases if case.label is not None or stage.method != "supervised"]


def _source(plan: PretrainingPlan, stage: Stage, material: Material, seed: int) -> Source:
    """What all sources give together; each process streams samples of its own."""
    sources: list[Source] = []
    shares = []
    for number, (cases, source) in enumerate(zip(material.training, plan.sources, strict=True)):
        if isinstance(cases, Streamed):
            sources.append(replace(cases, seed=case_seed(seed, number)))
        elif shown := usable(cases, stage):
            sources.append(Listed(shown, seed))
        else:
            continue  # of images alone, in a stage that needs labels
        shares.append(source.share)
    if len(sources) == 1:
        return sources[0]
    return Mixed(sources, [share / sum(shares) for share in shares], seed)


def _losses(aim: Objective, network: nn.Module, step: int) -> dict[str, Tensor]:
    return {"loss": finite(aim(network, step), step)}


def _evaluate(held_out: Objective | None, network: nn.Module) -> dict[str, float]:
    """The held-out loss; not a number where nothing is held out."""
    if held_out is None:
        return {"loss": float("nan")}
    return {"loss": float(torch.stack([held_out(network, step) for step in range(EVALUATED)]).mean())}


def _intensity(window: Window | None) -> dict[str, Any]:
    """What becomes of intensities before the network sees them."""
    if window is not None:
        return {"clip": [window.low, window.high], "subtract": window.mean, "divide_by": window.std}
    return {"clip_percentiles": list(CLIPPED), "then": "zero mean, unit variance", "each": "case and channel"}


def _record(plan: PretrainingPlan, histories: dict[str, History]) -> dict[str, Any]:
    """What the weights were made of, for those who are given them."""
    return {
        "format": 1,
        "network": plan.network.model_dump(mode="json"),
        "space": plan.space.model_dump(mode="json"),
        "intensity": _intensity(plan.space.window),
        "channels": plan.channels,
        "labels": {str(n): name for n, name in plan.labels.items()},
        "sources": [
            source.model_dump(mode="json", exclude={"folder"} if isinstance(source, DatasetSource) else None)
            for source in plan.sources
        ],
        "licences": sorted({source.licence or "not stated" for source in plan.sources}),
        "stages": [
            {
                "method": stage.method,
                "schedule": stage.schedule.model_dump(mode="json"),
                # Where nothing is held out there is no loss of it.
                "history": [
                    {name: value if math.isfinite(value) else None for name, value in entry.items()}
                    for entry in history
                ],
            }
            for stage, history in zip(plan.stages, histories.values(), strict=True)
        ],
        "versions": versions(),
    }
