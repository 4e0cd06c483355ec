"""``diffaug benchmark``: what do synthetic cases and variations add to a segmentation network?"""

from pathlib import Path
from typing import Annotated

import typer


def benchmark(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="YAML file of arms.")],
    data: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="Labelled dataset, split by patient."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder of cells, caches and report.")
    ],
    patients: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CSV with the columns case and patient.",
            show_default="patients.csv in the dataset, if any",
        ),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON file: case names of train, validation, test.",
            show_default="splits.json in the dataset",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, which share the CPU's cores.")] = 1,
    shard: Annotated[
        str, typer.Option(help="Run the i-th of n parts of the cells, such as 1/4.", metavar="i/n")
    ] = "1/1",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write the report of what is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be run, and stop.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, instead of its table.")
    ] = False,
) -> None:
    """Train the arms of CONFIG with few labels and many seeds, score them, and write report.html.

    Every cell (arm, number of labelled cases, seed) is a file of its own: interrupted at any moment, the same
    command goes on. Prints the table; the report's path goes to stderr.
    """
    import torch
    from filelock import FileLock

    from diffaug.benchmark.analysis import summarise
    from diffaug.benchmark.config import read_benchmark
    from diffaug.benchmark.report import markdown, write_report
    from diffaug.benchmark.running import all_cells, outline, part, run_cells
    from diffaug.benchmark.study import open_study
    from diffaug.progress import Progress

    first, count = _parse_shard(shard)
    progress = Progress()
    study = open_study(
        read_benchmark(config),
        data,
        output.absolute(),
        patients=patients,
        split=split,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    cells = all_cells(study.benchmark)
    own = part(cells, first, count)
    if dry_run:
        typer.echo("\n".join(outline(study, own)))
        return
    if not report_only:
        done = run_cells(study, own, jobs, progress)
        progress.note(f"{done} cells run, {len(own) - done} kept from before")
    summary = summarise(study, cells)
    (study.work / "cache").mkdir(parents=True, exist_ok=True)
    # Shards may end at the same time.
    with FileLock(study.work / "cache" / "report.lock"):
        path = write_report(study, summary, cells)
    progress.note(f"report: {path}")
    typer.echo(summary.model_dump_json() if as_json else "\n".join(markdown(summary)))


def _parse_shard(text: str) -> tuple[int, int]:
    """Index from 0, and number of parts."""
    try:
        first, count = map(int, text.split("/"))
    except ValueError:
        first, count = 0, 0
    if not 1 <= first <= count:
        raise typer.BadParameter(f"--shard is i/n with 1 <= i <= n, such as 1/4, not {text!r}")
    return first - 1, count
