"""Dice of a segmenter trained on a generator's samples, against the seconds that a sample takes.

For Medical Diffusion and the flagship, after equal training time, with several samplers. One segmenter,
trained on the real training cases, labels all samples of both; a point of the flagship with its own labels
stands beside them. A stopped run goes on where it stopped:

python benchmarks/sampling_speed/dice.py --medical-diffusion FOLDER --data SCANS --work CACHE

Dice does not depend on what else the machine does, seconds do: `--part` measures one of them.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "generator_quality"))

from bench import STEPS, Bench  # noqa: E402
from figures import segmenter_dice  # noqa: E402
from measure import busy_seconds, machine, say  # noqa: E402
from report import arm_mean, shown  # noqa: E402

from diffaug.cli.allocator import keep_freed_memory  # noqa: E402
from diffaug.files import atomic_path, atomic_write_json, atomic_write_text  # noqa: E402
from diffaug.generators.generator import Generator  # noqa: E402
from diffaug.generators.hardware import has_bfloat16  # noqa: E402

FLAGSHIP = "hippocampus-mr"
TIMED = 3


class Point(NamedTuple):
    """One way to sample. `own_labels`: the generator's instead of the judge's."""

    system: str
    sampler: str
    steps: int
    own_labels: bool = False

    @property
    def name(self) -> str:
        """Of the cell's file."""
        labels = "-own-labels" if self.own_labels else ""
        return f"{self.system}-{self.sampler.replace('+', 'p')}-{self.steps}{labels}"


POINTS = [
    Point("medical-diffusion", "ancestral", 300),
    Point("medical-diffusion", "dpm-solver++", 20),
    Point("medical-diffusion", "dpm-solver++", 10),
    Point("flagship", "adams-bashforth", 20),
    Point("flagship", "adams-bashforth", 10),
    Point("flagship", "adams-bashforth", 10, own_labels=True),
]


def main() -> None:
    """Measure what is missing, and draw what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--medical-diffusion", type=Path, help="folder of the generator; without it its points wait"
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for samples and segmenters")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "dice")
    parser.add_argument("--subset", choices=("validation", "test"), default="validation")
    parser.add_argument("--samples", type=int, default=20, help="of each point")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions of each training")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a segmenter")
    parser.add_argument("--only", nargs="+", metavar="POINT", default=[""], help="beginnings of names")
    parser.add_argument("--part", choices=("dice", "seconds"), help="measure only this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the scans are: --data, or the environment variable DIFFAUG_DATA")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    points = [point for point in POINTS if point.name.startswith(tuple(options.only))]
    if options.medical_diffusion is None:
        say("the points of Medical Diffusion need --medical-diffusion")
        points = [point for point in points if point.system == "flagship"]
    parts = {"dice": (options.subset, measure_dice), "seconds": ("seconds", measure_seconds)}
    for part in parts if options.part is None else (options.part,):
        folder, measure = parts[part]
        for point in points:
            bench = make_bench(point, options)
            training = {name: getattr(options, name) for name in ("samples", "seeds", "steps")}
            depends_on = {"segmenter": bench.segmenter_hash, **training} if part == "dice" else machine()
            identity = {"generator": bench.generator_hash, **depends_on}
            file = options.results / folder / f"{point.name}.json"
            if file.exists() and json.loads(file.read_text())["identity"] == identity:
                say(f"{part} of {point.name}: there")
                continue
            atomic_write_json(file, {"identity": identity, **point._asdict(), **measure(bench)})
            say(f"{part} of {point.name}: measured")
    write_report(options.results, options.subset)


def make_bench(point: Point, options: argparse.Namespace) -> Bench:
    """What measures a point."""
    return Bench(
        FLAGSHIP if point.system == "flagship" else str(options.medical_diffusion),
        options.subset,
        options.data,
        options.work,
        options.steps,
        options.samples,
        options.seeds,
        point.sampler,
        point.steps,
        judged=not point.own_labels,
    )


def measure_dice(bench: Bench) -> dict[str, Any]:
    """Dice on real cases of segmenters trained on the samples."""
    held_out = bench.held_out
    runs = [
        segmenter_dice(bench.segmenter("synthetic", bench.pairs, seed), held_out.images, held_out.labels)
        for seed in bench.seeds
    ]
    return {
        "training_seconds": bench.generator.card.training.seconds,
        "patients": list(held_out.patients),
        "dice": runs,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measure_seconds(bench: Bench) -> dict[str, Any]:
    """Seconds a sample, one at a time, after one that warms up."""
    sampling = bench.sampling
    bench.generator.sample(1, **sampling)
    seconds = []
    busy, own, began = busy_seconds(), process_time(), perf_counter()
    for seed in range(TIMED):
        start = perf_counter()
        bench.generator.sample(1, seed=seed, **sampling)
        seconds.append(perf_counter() - start)
    others = (busy_seconds() - busy - (process_time() - own)) / (perf_counter() - began)
    return {
        "seconds": seconds,
        "precision": "bfloat16" if has_bfloat16() and in_bfloat16(bench.generator) else "float32",
        "other_processes_cores": max(0.0, others),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_bfloat16(generator: Generator) -> bool:
    """Whether its networks work in mixed precision where the hardware has it; the flagship's always do."""
    return bool(getattr(generator.card.networks, "bfloat16", True))


def write_report(results: Path, subset: str) -> None:
    """Write `table.md` and `dice.png` beside the cells of one subset, of the points that have both parts."""
    dice, seconds = (
        {file.name: json.loads(file.read_text()) for file in sorted((results / part).glob("*.json"))}
        for part in (subset, "seconds")
    )
    names = [name for name in dice if name in seconds]
    if not names:
        return
    _all_alike(results / subset, [dice[name] for name in names], ("segmenter", "samples", "seeds", "steps"))
    _all_alike(results / "seconds", [seconds[name] for name in names], tuple(machine()))
    cells = [seconds[name] | dice[name] for name in names]
    cells.sort(key=lambda cell: (cell["system"], -median(cell["seconds"])))
    lines = [
        "| system | sampler | precision | labels | seconds a sample | Dice on real cases | training, h |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        mean = arm_mean([{"dice": run, "patients": cell["patients"]} for run in cell["dice"]])
        row = [
            cell["system"],
            f"{cell['sampler']}, {cell['steps']} steps",
            cell["precision"],
            "generator" if cell["own_labels"] else "judge",
            f"{median(cell['seconds']):.2f}",
            shown(mean),
            "unknown" if (spent := cell["training_seconds"]) is None else f"{spent / 3600:.1f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    atomic_write_text(results / subset / "table.md", "\n".join(lines) + "\n")
    _draw(cells, results / subset / "dice.png")


def _all_alike(folder: Path, cells: list[dict[str, Any]], keys: Sequence[str]) -> None:
    if len({json.dumps([cell["identity"][key] for key in keys]) for cell in cells}) > 1:
        raise SystemExit(f"the cells in {folder} differ in {', '.join(keys)}: measure all again")


def _draw(cells: list[dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {
        ("medical-diffusion", False): ("tab:orange", "o", "Medical Diffusion"),
        ("flagship", False): ("tab:blue", "o", "flagship"),
        ("flagship", True): ("tab:blue", "*", "flagship, its own labels"),
    }
    for (system, own_labels), (colour, marker, title) in styles.items():
        own = [cell for cell in cells if (cell["system"], cell["own_labels"]) == (system, own_labels)]
        if not own:
            continue
        dice = [arm_mean([{"dice": run, "patients": c["patients"]} for run in c["dice"]]) for c in own]
        x, y = [median(cell["seconds"]) for cell in own], [interval.value for interval in dice]
        error = [[i.value - i.low for i in dice], [i.high - i.value for i in dice]]
        axis.errorbar(x, y, error, color=colour, marker=marker, capsize=3, lw=1, label=title)
        for n, (cell, a, b) in enumerate(zip(own, x, y, strict=True)):
            axis.annotate(
                f"{cell['sampler']}\n{cell['steps']} steps",
                (a, b),
                textcoords="offset points",
                xytext=(6, -18 if n % 2 else 6),
                fontsize=7,
            )
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.set(xlabel="seconds a sample", ylabel="Dice of a segmenter trained on samples")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
