"""What the cells of a benchmark say: scores of each arm, and how arms differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, computed_field

from diffaug.benchmark.cells import Cell, CellResult, is_done, read_cell
from diffaug.benchmark.config import Benchmark
from diffaug.benchmark.study import Study
from diffaug.errors import DiffaugError
from diffaug.evaluation.statistics import (
    Interval,
    gap_interval,
    hierarchical_interval,
    holm,
    signed_rank,
)

Figure = Literal["dice", "nsd", "hd95"]


# With fewer, nothing is said of a gain: how much seeds differ is not known.
FEWEST_SEEDS = 3


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArmFigures(_Part):
    """One arm with a number of labelled cases (None: all).

    Attributes:
        arm, title: of the arm; `knew`: what its generator had seen, or "".
        labelled: number of labelled cases.
        seeds: that were run; steps: of the optimiser in all.
        dice, nsd, hd95: means over seeds and cases, with intervals over seeds and patients.
        by_label: mean Dice of each structure; by_seed: of each seed.
        gain: Dice beyond the comparator's on the `compared` seeds that both have; p: by Wilcoxon's test over
            patients, given these seeds, None of fewer than 3; holm: the same, adjusted for the number of
            arms.
        share: of the gap between comparator and ceiling, on the seeds that all three have; None where these
            are fewer than 3, or the ceiling is not above the comparator.
        verdict: in words, by the interval of the gain, which is not adjusted for the number of arms.
    """

    arm: str
    title: str
    knew: str
    labelled: int | None
    seeds: list[int]
    steps: int
    dice: Interval
    nsd: Interval
    hd95: Interval
    by_label: dict[str, float]
    by_seed: list[float]
    gain: Interval | None = None
    compared: int = 0
    p: float | None = None
    holm: float | None = None
    share: Interval | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> str:
        if self.gain is None:
            return ""
        if self.compared < FEWEST_SEEDS:
            return f"fewer than {FEWEST_SEEDS} seeds"
        if self.gain.low > 0:
            return "gain"
        return "loss" if self.gain.high < 0 else "no gain"


class Margin(_Part):
    """Whether an arm is worse than another by less than a margin of Dice.

    Attributes:
        difference: of the arm's Dice from the reference's.
        met: whether the whole interval lies above minus the margin.
    """

    arm: str
    reference: str
    labelled: int | None
    margin: float
    difference: Interval

    @computed_field  # type: ignore[prop-decorator]
    @property
    def met(self) -> bool:
        return self.difference.low > -self.margin


class Summary(_Part):
    """Everything that a report shows; `missing` of the `cells` are still to be run."""

    benchmark: Benchmark
    dataset: str
    licence: str | None
    scored: int
    patients: int
    generator: str
    network: str
    arms: list[ArmFigures]
    margins: list[Margin]
    missing: int
    cells: int


class _Run:
    """Results of one arm with one number of labelled cases, by seed."""

    def __init__(self, results: dict[int, CellResult]) -> None:
        self.results = results

    def values(self, seeds: Sequence[int], figure: Figure = "dice") -> NDArray[np.float64]:
        """`(seeds, cases)`, mean over labels."""
        return np.array([[score.mean(figure) for score in self.results[s].scores] for s in seeds])

    @property
    def patients(self) -> list[str]:
        return [score.patient for score in next(iter(self.results.values())).scores]


def summarise(study: Study, cells: Sequence[Cell]) -> Summary:
    """Figures of the cells that are done.

    Raises:
        DiffaugError: none is, or one is damaged.
    """
    benchmark = study.benchmark
    runs: dict[tuple[str, int | None], _Run] = {}
    missing = 0
    for cell in cells:
        if is_done(study, cell):
            file = cell.file(study.work)
            runs.setdefault((cell.arm, cell.labelled), _Run({})).results[cell.seed] = read_cell(file)
        else:
            missing += 1
    if not runs:
        raise DiffaugError(f"{study.work} holds no result yet")
    used = any(benchmark.uses_generator(arm) for arm in benchmark.arms.values())
    arms = []
    for labelled in benchmark.labelled:
        arms += _with_gains(study, runs, labelled)
    arms += [_figures(study, name, None, run) for (name, count), run in runs.items() if count is None]
    margins = [
        found
        for labelled in benchmark.labelled
        for comparison in benchmark.comparisons
        if (found := _margin(runs, comparison.arm, comparison.reference, labelled, comparison.margin))
    ]
    return Summary(
        benchmark=benchmark,
        dataset=study.dataset.name,
        licence=study.dataset.licence,
        scored=len(study.scored),
        patients=len({case.patient for case in study.scored}),
        generator=f"{study.card.name} {study.card.weights_hash[:12]}" if used else "none",
        network="nnU-Net" if benchmark.backend == "nnunet" else study.network.kind,
        arms=arms,
        margins=margins,
        missing=missing,
        cells=len(cells),
    )


def _with_gains(study: Study, runs: dict[tuple[str, int | None], _Run], labelled: int) -> list[ArmFigures]:
    """Figures of all arms with so many labelled cases, those beside the comparator adjusted together."""
    benchmark = study.benchmark
    comparator = runs.get((benchmark.comparator, labelled))
    ceiling = None if benchmark.ceiling is None else runs.get((benchmark.ceiling, None))
    found = []
    for name in benchmark.arms:
        if (run := runs.get((name, labelled))) is None:
            continue
        figures = _figures(study, name, labelled, run)
        if comparator is not None and name != benchmark.comparator:
            gain = _difference(run, comparator)
            if gain is not None:
                own = {
                    "gain": hierarchical_interval(gain, run.patients),
                    "compared": len(gain),
                    "p": signed_rank(gain, run.patients) if len(gain) >= FEWEST_SEEDS else None,
                    "share": None if ceiling is None else _share(run, comparator, ceiling),
                }
                figures = figures.model_copy(update=own)
        found.append(figures)
    tested = [n for n, figures in enumerate(found) if figures.p is not None]
    adjusted = holm([found[n].p or 0.0 for n in tested])
    for n, value in zip(tested, adjusted, strict=True):
        found[n] = found[n].model_copy(update={"holm": value})
    return found


def _share(run: _Run, comparator: _Run, ceiling: _Run) -> Interval | None:
    """Of the gap between comparator and ceiling, on the seeds that all three have; None where these are too
    few, or the ceiling is not above the comparator."""
    seeds = sorted(set(run.results) & set(comparator.results) & set(ceiling.results))
    if len(seeds) < FEWEST_SEEDS:
        return None
    below = comparator.values(seeds)
    gap = ceiling.values(seeds) - below
    if hierarchical_interval(gap, run.patients).low <= 0:
        return None
    return gap_interval(run.values(seeds) - below, gap, run.patients)


def _figures(study: Study, name: str, labelled: int | None, run: _Run) -> ArmFigures:
    benchmark, arm = study.benchmark, study.benchmark.arms[name]
    seeds = sorted(run.results)
    scores = [score for seed in seeds for score in run.results[seed].scores]
    by_label = {label: float(np.mean([score.dice[label] for score in scores])) for label in scores[0].dice}
    return ArmFigures(
        arm=name,
        title=arm.title or name,
        knew=_knew(study, name),
        labelled=labelled,
        seeds=seeds,
        steps=benchmark.total_steps(arm),
        dice=hierarchical_interval(run.values(seeds), run.patients),
        nsd=hierarchical_interval(run.values(seeds, "nsd"), run.patients),
        hd95=hierarchical_interval(run.values(seeds, "hd95"), run.patients),
        by_label=by_label,
        by_seed=run.values(seeds).mean(1).tolist(),
    )


def _knew(study: Study, name: str) -> str:
    """What an arm knew beyond its labelled cases."""
    arm = study.benchmark.arms[name]
    parts = []
    if study.benchmark.uses_generator(arm):
        training = study.card.training
        seen = training.cases.get("train", 0)
        what = "labelled cases" if study.card.labels and training.labelled is None else "images"
        some = "" if training.labelled is None else f", {training.labelled} of them with labels"
        parts.append(f"its generator saw {seen} {what}{some}")
    for stage in arm.pretraining:
        if stage.data == "real":
            what = "labelled cases" if stage.method == "supervised" else "images without their labels"
            parts.append(f"pretrained on {len(study.training)} real {what}")
        elif stage.data != "synthetic":
            parts.append(f"pretrained on {Path(stage.data).name}")
    return ", ".join(dict.fromkeys(parts))


def _difference(run: _Run, other: _Run) -> NDArray[np.float64] | None:
    """Dice of one beyond the other's on their common seeds, `(seeds, cases)`."""
    seeds = sorted(set(run.results) & set(other.results))
    return run.values(seeds) - other.values(seeds) if seeds else None


def _margin(
    runs: dict[tuple[str, int | None], _Run], arm: str, reference: str, labelled: int, margin: float
) -> Margin | None:
    run, other = (runs.get((name, labelled)) for name in (arm, reference))
    if run is None or other is None or (difference := _difference(run, other)) is None:
        return None
    return Margin(
        arm=arm,
        reference=reference,
        labelled=labelled,
        margin=margin,
        difference=hierarchical_interval(difference, run.patients),
    )
