"""Measure a generator of hippocampi: every figure of README.md, cell by cell.

A stopped run goes on where it stopped:

python benchmarks/generator_quality/run.py --generator hippocampus-mr --data SCANS --work CACHE
"""

import argparse
import json
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bench import STEPS, Bench, Cell, say
from figures import FIGURES
from report import write_report

from diffaug.cli.allocator import keep_freed_memory
from diffaug.files import atomic_write_json

HERE = Path(__file__).parent


def main() -> None:
    """Parse the command line, measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--generator",
        help="name of a bundled generator, or folder of one; without it only the cells of real cases",
    )
    parser.add_argument(
        "--subset", choices=("validation", "test"), default="validation", help="the held-out cases"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("DIFFAUG_DATA"),
        help="folder that holds Task04_Hippocampus (default: DIFFAUG_DATA)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for sampled pairs and trained segmenters, outside the repository",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the cells")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CELL",
        default=[""],
        help=f"figures ({', '.join(FIGURES)}) or beginnings of cell names",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a segmenter")
    parser.add_argument("--pairs", type=int, default=500, help="number of sampled pairs")
    parser.add_argument("--sampler", help="of the pairs and of vary (default: the card's)")
    parser.add_argument("--sampler-steps", type=int, help="steps of that sampler (default: its own)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of each training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--list", action="store_true", help="show which cells are there, and measure nothing")
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the scans are: --data, or the environment variable DIFFAUG_DATA")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    bench = Bench(
        options.generator,
        options.subset,
        options.data,
        options.work,
        options.steps,
        options.pairs,
        options.seeds,
        options.sampler,
        options.sampler_steps,
    )
    folder = options.results / options.subset
    cells = [cell for figure in FIGURES.values() for cell in figure(bench)]
    cells = [cell for cell in cells if cell.name.startswith(tuple(options.only))]
    if not cells:
        parser.error(f"no cell begins with {', '.join(options.only)}")
    for cell in cells:
        file = folder / f"{cell.name}.json"
        if is_current(file, cell, bench):
            state = "there"
        elif cell.of_generator and bench.name is None:
            state = "needs --generator"
        elif options.list:
            state = "missing"
        else:
            atomic_write_json(file, measure(cell, bench))
            state = "measured"
        say(f"{cell.name}: {state}")
    if not options.list:
        write_report(folder)


def identity(cell: Cell, bench: Bench) -> dict[str, Any]:
    """What a cell's figures depend on besides the code that measures them."""
    return {
        "subset": bench.subset,
        "generator": bench.generator_hash if cell.of_generator else None,
        "segmenter": bench.segmenter_hash,
        "steps": bench.steps,
        "pairs": bench.pairs if cell.of_generator else None,
        **cell.settings,
    }


def is_current(file: Path, cell: Cell, bench: Bench) -> bool:
    """Whether the cell was measured, and on what would be measured now; without a generator any counts."""
    if not file.exists():
        return False
    found = json.loads(file.read_text())["identity"]
    if bench.name is None and cell.of_generator:
        return True
    return bool(found == identity(cell, bench))


def measure(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Measure one cell."""
    start = perf_counter()
    values = cell.measure()
    return {
        "identity": identity(cell, bench),
        "values": values,
        "seconds": round(perf_counter() - start, 2),
        "load_average": os.getloadavg()[0],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy")},
    }


if __name__ == "__main__":
    main()
