"""Running the cells of a benchmark: in this process or in several, a shard of them or all."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from threading import Thread

import torch
from filelock import FileLock

from diffaug.benchmark.cells import Cell, is_done, run_cell
from diffaug.benchmark.config import Benchmark
from diffaug.benchmark.study import Study, draw_labelled
from diffaug.errors import DiffaugError
from diffaug.progress import Progress


def all_cells(benchmark: Benchmark) -> list[Cell]:
    """Every cell, seed by seed, so that what is there early compares all arms."""
    found = []
    for seed in range(max(arm.seeds or benchmark.seeds for arm in benchmark.arms.values())):
        for name, arm in benchmark.arms.items():
            if seed >= (arm.seeds or benchmark.seeds):
                continue
            counts = benchmark.labelled if arm.labels == "few" else [None]
            found += [Cell(count, name, seed) for count in counts]
    return found


def part(cells: Sequence[Cell], first: int, count: int) -> list[Cell]:
    """The part `first`, from 0, of `count`: an even share of each seed, of other arms each time."""
    return [cell for n, cell in enumerate(cells) if (n + cell.seed) % count == first]


def outline(study: Study, cells: Sequence[Cell]) -> list[str]:
    """What is to be run, as lines of a table, and whose labels each seed draws."""
    benchmark, rows = study.benchmark, Counter[tuple[str, str]]()
    pending = [cell for cell in cells if not is_done(study, cell)]
    for cell in cells:
        count = "all" if cell.labelled is None else str(cell.labelled)
        rows[count, cell.arm] += cell in pending
    lines = ["| labelled | arm | steps | cells to run |", "|---|---|---|---|"]
    lines += [
        f"| {count} | {arm} | {benchmark.total_steps(benchmark.arms[arm])} | {left} |"
        for (count, arm), left in rows.items()
    ]
    lines.append("")
    for labelled in benchmark.labelled:
        for seed in sorted({cell.seed for cell in cells if cell.labelled == labelled}):
            drawn = [case.name for case in draw_labelled(study.training, labelled, seed)]
            more = f" and {len(drawn) - 8} more" if len(drawn) > 8 else ""
            lines.append(f"- {labelled} labelled, seed {seed}: {', '.join(drawn[:8])}{more}")
    steps = sum(benchmark.total_steps(benchmark.arms[cell.arm]) for cell in pending)
    lines += ["", f"{len(pending)} of {len(cells)} cells are to be run, {steps} steps in all."]
    return lines


def run_cells(study: Study, cells: Sequence[Cell], jobs: int, progress: Progress) -> int:
    """Run the cells that are not done; each is kept as soon as it is.

    Args:
        jobs: processes, which share the CPU's cores.

    Returns:
        How many were run.

    Raises:
        DiffaugError: a cell was made by other settings, or cannot be run; names it.
    """
    if jobs < 1:
        raise DiffaugError(f"jobs must be at least 1, got {jobs}")
    pending = [cell for cell in cells if not is_done(study, cell)]
    with progress.task("cells", total=len(cells), completed=len(cells) - len(pending)) as task:
        if jobs == 1:
            for cell in pending:
                _named(study, cell)
                task.advance()
            return len(pending)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        pool = ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(threads, os.getpid())
        )
        try:
            for done in as_completed([pool.submit(_named, study, cell) for cell in pending]):
                done.result()
                task.advance()
        finally:
            pool.shutdown(cancel_futures=True)
    return len(pending)


def _begin(threads: int, parent: int) -> None:
    """Start a worker, which ends where its parent was killed: cells take minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    torch.set_num_threads(threads)
    Thread(target=watch, daemon=True).start()


def _named(study: Study, cell: Cell) -> None:
    """Run a cell unless another process has; errors name it."""
    lock = study.work / "cache" / f"{cell.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):
            if not is_done(study, cell):
                run_cell(study, cell, Progress(quiet=True))
    except DiffaugError as error:
        raise DiffaugError(f"{cell}: {error}") from error
