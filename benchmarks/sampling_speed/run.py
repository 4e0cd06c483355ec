"""Time the generator beside the seed's system and MONAI's: every figure of README.md, cell by cell.

A stopped run goes on where it stopped:

python benchmarks/sampling_speed/run.py --threads 2
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from competitors import COMPETITORS, SEED_RECIPE
from report import fill_readme, write_report

HERE = Path(__file__).parent
# glibc gives the memory of a network's large tensors back to the system, which then has to map and clear it
# again for the next ones; with these settings it keeps it. Other allocators ignore them.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
# Kept memory inflates the peak, so that is measured in another process, with the allocator's own settings; it
# does not depend on the number of steps.
KINDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "time": ([], KEEP_MEMORY),
    "memory": (["--most-steps=4", "--draws=1"], {}),
}
SMOKE = ["--most-steps=2", "--draws=1"]


def main() -> None:
    """Parse the command line, measure what is missing, each cell in its own process, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of every competitor")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for the cells")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="beginnings of cell names")
    parser.add_argument(
        "--rounds", type=int, default=3, help="passes over all cells but the seed's recipe, one after another"
    )
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [each.name for each in COMPETITORS if each.name.startswith(tuple(options.only))]
    if not chosen:
        parser.error(
            f"no cell begins with {', '.join(options.only)}; there are "
            f"{', '.join(each.name for each in COMPETITORS)}"
        )
    own = (HERE / "results").resolve() == options.output.resolve()
    if options.smoke and own:
        parser.error("--smoke measures nothing: give it an --output of its own")
    for turn, name, kind in turns(chosen, 1 if options.smoke else options.rounds):
        flags, malloc = KINDS[kind]
        command = [sys.executable, HERE / "measure.py", name, options.output / kind / f"{name}.json"]
        command += [f"--threads={options.threads}", f"--round={turn}", *(SMOKE if options.smoke else flags)]
        command += ["--again"] if options.again and turn == 1 else []
        subprocess.run(command, check=True, env=environment(options.threads, malloc))
    write_report(options.output)
    table = options.output / "table.md"
    print(table.read_text(encoding="utf-8") if table.exists() else "there is no cell to report")
    if own and table.exists():
        fill_readme(HERE / "README.md", table)


def turns(names: list[str], rounds: int) -> Iterator[tuple[int, str, str]]:
    """Round, competitor and kind of each process, in order.

    The speed of a virtual machine changes by a fifth from one minute to the next: competitors take turns, so
    that each meets all of it. The seed's recipe lasts minutes a draw and is timed in the first round alone.
    """
    for turn in range(1, rounds + 1):
        for name in names:
            if turn == 1 or name != SEED_RECIPE.name:
                yield turn, name, "time"
            if turn == 1:
                yield turn, name, "memory"


def environment(threads: int, malloc: dict[str, str]) -> dict[str, str]:
    """The environment of a measuring process, in which these settings of the allocator alone hold."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return {**others, **malloc, "OMP_NUM_THREADS": str(threads)}


if __name__ == "__main__":
    main()
