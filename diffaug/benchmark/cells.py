"""One cell of a benchmark: an arm, a number of labelled cases, a seed. Each is a JSON file of its own."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffaug.benchmark.config import Arm
from diffaug.benchmark.nnunet_backend import home, train_and_predict
from diffaug.benchmark.pools import digest, pretraining_cases, variants
from diffaug.benchmark.study import Study, draw_labelled
from diffaug.datasets.manifest import differences
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import DiffaugError
from diffaug.files import atomic_path, atomic_write_json, read_json
from diffaug.generators.seeds import case_seed
from diffaug.pretraining.loading import load_pretrained, tensors
from diffaug.pretraining.stages import hand_over, objective, trained_network
from diffaug.progress import Progress
from diffaug.segmentation.cases import read_prepared
from diffaug.segmentation.networks import build_network
from diffaug.segmentation.patches import Listed, Patches
from diffaug.segmentation.prediction import predict_case
from diffaug.segmentation.scoring import score
from diffaug.segmentation.training import Objective, Schedule, Segmentation, optimise

# Losses that a cell keeps.
POINTS = 100


class Cell(NamedTuple):
    """Which: number of labelled cases (None: all), arm and seed."""

    labelled: int | None
    arm: str
    seed: int

    def file(self, work: Path) -> Path:
        """Where its result lies."""
        count = "all" if self.labelled is None else str(self.labelled)
        return work / "cells" / f"labelled-{count}" / self.arm / f"seed-{self.seed}.json"

    @property
    def name(self) -> str:
        """As a file's name."""
        return "-".join(self.file(Path()).with_suffix("").parts[1:])

    def __str__(self) -> str:
        count = "all cases" if self.labelled is None else f"{self.labelled} labelled"
        return f"{self.arm}, {count}, seed {self.seed}"


class CaseScore(BaseModel):
    """Scores of one case, by the label's name: Dice, normalised surface distance, HD95 (mm)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: str
    patient: str
    dice: dict[str, float]
    nsd: dict[str, float]
    hd95: dict[str, float]

    def mean(self, figure: Literal["dice", "nsd", "hd95"] = "dice") -> float:
        """Over labels."""
        return float(np.mean(list(getattr(self, figure).values())))


class CellResult(BaseModel):
    """What came of a cell.

    Attributes:
        settings: everything that decided it.
        labelled_cases: whose labels it was given.
        scores: of each scored case.
        losses: of training on real labels, means over even parts of it; pretraining_losses: of each stage.
        loaded: what of the pretrained weights was loaded.
        seconds: of each part; threads: of the CPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    settings: dict[str, Any]
    labelled_cases: list[str]
    scores: list[CaseScore]
    losses: list[float]
    pretraining_losses: list[list[float]]
    loaded: str | None
    seconds: dict[str, float]
    threads: int


def read_cell(file: Path) -> CellResult:
    """A cell's result.

    Raises:
        DiffaugError: the file is damaged.
    """
    try:
        return CellResult.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise DiffaugError(f"{file} is no result of a benchmark, or damaged: remove it") from error


def is_done(study: Study, cell: Cell) -> bool:
    """Whether a cell was run.

    Raises:
        DiffaugError: it was, by other settings.
    """
    file = cell.file(study.work)
    if not file.exists():
        return False
    wanted = study.settings(study.benchmark.arms[cell.arm], cell.labelled, cell.seed)
    if changed := differences(read_cell(file).settings, wanted):
        raise DiffaugError(
            f"{file} was made by other settings ({'; '.join(changed[:3])}): give another output, or remove it"
        )
    return True


def run_cell(study: Study, cell: Cell, progress: Progress) -> CellResult:
    """Train and score; the result is written last."""
    benchmark, arm = study.benchmark, study.benchmark.arms[cell.arm]
    chosen = study.training
    if cell.labelled is not None:
        chosen = draw_labelled(study.training, cell.labelled, cell.seed)
    train = _by_nnunet if benchmark.backend == "nnunet" else _by_monai
    seconds: dict[str, float] = {}
    outcome = train(study, cell, chosen, seconds, progress)
    scores = _score(study, outcome.predictions)
    result = CellResult(
        settings=study.settings(arm, cell.labelled, cell.seed),
        labelled_cases=[case.name for case in chosen],
        scores=scores,
        losses=outcome.losses,
        pretraining_losses=outcome.pretraining_losses,
        loaded=outcome.loaded,
        seconds=seconds,
        threads=torch.get_num_threads(),
    )
    _keep_predictions(study, cell, outcome.predictions)
    atomic_write_json(cell.file(study.work), result.model_dump(mode="json"))
    return result


class _Outcome(NamedTuple):
    """Predicted label maps by case, and what a cell tells of its training."""

    predictions: dict[str, NDArray[np.int16]]
    losses: list[float]
    pretraining_losses: list[list[float]]
    loaded: str | None


def _by_monai(
    study: Study, cell: Cell, chosen: Sequence[CaseFiles], seconds: dict[str, float], progress: Progress
) -> _Outcome:
    """Train the benchmark's network on the chosen cases."""
    benchmark, arm = study.benchmark, study.benchmark.arms[cell.arm]
    classes = len(study.labels) + 1
    loaded: str | None = None
    pretraining_losses: list[list[float]] = []
    with _timed(seconds, "pretraining"):
        network = build_network(study.network, study.channels, classes, seed=cell.seed).to(study.device)
        if arm.pretraining:
            weights, pretraining_losses = pretrained(study, arm, cell.seed, progress)
            last = arm.pretraining[-1].method
            loaded = str(hand_over(network, study.network, weights, last, "supervised"))
    with _timed(seconds, "variants"):
        swap = variants(study, arm, chosen, cell.seed, progress)
    cases = read_prepared(chosen, study.space, study.classes, progress, "reading labelled cases")
    with _timed(seconds, "training"):
        schedule = benchmark.fine_tuning(arm)
        own = case_seed(cell.seed, 0)
        patches = Patches(Listed(cases, own), study.space.patch, schedule.batch, own, swap)
        losses = _optimise(network, Segmentation(patches, classes, schedule), schedule, str(cell), progress)
    with _timed(seconds, "prediction"):
        scored = read_prepared(study.scored, study.space, study.classes, progress, "reading scored cases")
        ids = np.array([0, *study.labels], dtype=np.int16)
        predictions = {
            case.name: ids[predict_case(network, case, study.space.patch).numpy()] for case in scored
        }
    return _Outcome(predictions, losses, pretraining_losses, loaded)


def _by_nnunet(
    study: Study, cell: Cell, chosen: Sequence[CaseFiles], seconds: dict[str, float], progress: Progress
) -> _Outcome:
    """Train nnU-Net on the chosen cases; its log holds its losses."""
    arm, file = study.benchmark.arms[cell.arm], None
    pretraining_losses: list[list[float]] = []
    with _timed(seconds, "pretraining"):
        if arm.pretraining:
            weights, pretraining_losses = pretrained(study, arm, cell.seed, progress)
            last = arm.pretraining[-1].method
            plan, classes = study.network, len(study.labels) + 1
            network = trained_network(last, plan, study.channels, classes, cell.seed)
            load_pretrained(network, weights)
            file = home(study.work) / f"{cell.name}.pth"
            with atomic_path(file) as temporary:
                torch.save({"network_weights": network.state_dict()}, temporary)
    with _timed(seconds, "training"):
        predictions = train_and_predict(
            arm,
            study.benchmark.generator,
            chosen,
            study.benchmark.fine_tuning(arm).steps,
            file,
            cell.seed,
            study.work,
            study.benchmark.name,
            cell.name,
        )
    if file is not None:
        file.unlink()
    loaded = None if file is None else "by nnU-Net: all but the last layers"
    return _Outcome(predictions, [], pretraining_losses, loaded)


def pretrained(
    study: Study, arm: Arm, seed: int, progress: Progress
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Weights after the arm's stages of pretraining, and the losses of each; kept on disk, since cells with
    more labelled cases begin with the same."""
    settings = study.settings(arm, None, seed)
    own: dict[str, Any] = {"stages": [stage.model_dump(mode="json") for stage in arm.pretraining]}
    own |= {name: settings[name] for name in ("network", "space", "generator", "data", "cases", "seed")}
    own["schedules"] = [
        study.benchmark.stage_schedule(arm, stage).model_dump(mode="json") for stage in arm.pretraining
    ]
    file = study.work / "cache" / f"pretrained-{digest(own)}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            weights: dict[str, Tensor] = {}
            losses: list[list[float]] = []
            for number in range(len(arm.pretraining)):
                weights, loss = _stage(study, arm, number, weights, seed, progress)
                losses.append(loss)
            atomic_write_json(file.with_suffix(".json"), losses)
            with atomic_path(file) as temporary:
                save_file(weights, temporary)
    return load_file(file), read_json(file.with_suffix(".json"))


def _stage(
    study: Study, arm: Arm, number: int, weights: dict[str, Tensor], seed: int, progress: Progress
) -> tuple[dict[str, Tensor], list[float]]:
    """One stage of pretraining, from the weights of the stage before it."""
    stage, plan = arm.pretraining[number], study.network
    cases = pretraining_cases(study, stage, seed, progress)
    classes = len(study.labels) + 1
    network = trained_network(stage.method, plan, study.channels, classes, seed).to(study.device)
    if weights:
        hand_over(network, plan, weights, arm.pretraining[number - 1].method, stage.method)
    schedule = study.benchmark.stage_schedule(arm, stage)
    stage_seed = case_seed(seed, 1 + number)
    patches = Patches(Listed(cases, stage_seed), study.space.patch, schedule.batch, stage_seed)
    aim = objective(stage.method, patches, classes, schedule)
    losses = _optimise(network, aim, schedule, f"{stage.method} pretraining", progress)
    return {name: value.detach().cpu().contiguous() for name, value in tensors(network).items()}, losses


def _optimise(
    network: nn.Module, aim: Objective, schedule: Schedule, title: str, progress: Progress
) -> list[float]:
    """Train with a bar; the losses in at most `POINTS` means."""
    losses: list[float] = []
    with progress.task(title, total=schedule.steps) as task:

        def on_step(_: int, loss: float) -> None:
            losses.append(loss)
            task.advance(loss=loss)

        optimise(network, aim, schedule, on_step)
    return [float(part.mean()) for part in np.array_split(losses, min(POINTS, len(losses)))]


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[part] = round(time.monotonic() - began, 1)


def _score(study: Study, predictions: dict[str, NDArray[np.int16]]) -> list[CaseScore]:
    """Scores of all cases, on their own voxels."""
    names = [study.dataset.labels[number] for number in study.labels]
    scores = []
    for case in study.scored:
        loaded = load_case(case)
        assert loaded.label is not None
        spacing = np.linalg.norm(loaded.affine[:3, :3], axis=0)
        own, true = (torch.from_numpy(label) for label in (predictions[case.name], loaded.label))
        found = score(own, true, study.labels, spacing, study.benchmark.tolerance)
        rows = {
            figure: dict(zip(names, (float(getattr(one, figure)) for one in found), strict=True))
            for figure in ("dice", "nsd", "hd95")
        }
        scores.append(CaseScore(case=case.name, patient=case.patient, **rows))
    return scores


def _keep_predictions(study: Study, cell: Cell, predictions: dict[str, NDArray[np.int16]]) -> None:
    """For the montages of the report."""
    file = study.work / "predictions" / cell.file(Path()).relative_to("cells").with_suffix(".npz")
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **predictions)  # type: ignore[arg-type]
