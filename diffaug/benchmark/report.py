"""The report of a benchmark: one HTML page, tables as CSV, the summary as JSON, figures as PNG."""

import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffaug.benchmark.analysis import ArmFigures, Summary
from diffaug.benchmark.cells import Cell, read_cell
from diffaug.benchmark.study import Study
from diffaug.datasets.volumes import load_case
from diffaug.evaluation.statistics import Interval
from diffaug.figures import montage
from diffaug.files import atomic_path, atomic_write_json, atomic_write_text
from diffaug.pages import embedded, picture, png, table, write_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Cases that each arm's montage shows: those with the lowest Dice.
WORST = 3
GAIN, NONE = "#0072b2", "0.55"


def write_report(study: Study, summary: Summary, cells: Sequence[Cell]) -> Path:
    """Write `report.html`, `summary.json`, `table.md`, `cases.csv`, `dice.png`; the page's path."""
    folder = study.work
    atomic_write_json(folder / "summary.json", summary.model_dump(mode="json"))
    atomic_write_text(folder / "table.md", "\n".join(markdown(summary)) + "\n")
    atomic_write_text(folder / "cases.csv", _csv(study, cells))
    dice = png(lambda figure: draw_arms(figure, summary), _size(summary))
    with atomic_path(folder / "dice.png") as temporary:
        temporary.write_bytes(dice)
    parts = [
        _head(summary),
        _answers(summary),
        embedded(dice, DICE_CAPTION),
        _scores(summary),
        _structures(summary),
        _margins(summary),
        _efficiency(summary),
        _worst(study, summary, cells),
        _details(summary),
    ]
    path = folder / "report.html"
    write_html(f"Benchmark {summary.benchmark.name}", parts, path)
    return path


DICE_CAPTION = (
    "Left: mean Dice of each arm over seeds and cases, with 95 % intervals over seeds and patients; small "
    "dots are seeds. Right: Dice beyond the comparator's, paired by seed and case; blue: the interval lies "
    "above 0. The widest intervals may go on beyond the frame."
)


# -- tables --------------------------------------------------------------------------------------------------


def markdown(summary: Summary) -> list[str]:
    """The lines of a Markdown table of all arms."""
    lines = [
        "| labelled | arm | steps | seeds | Dice | NSD | HD95, mm | Dice beyond the comparator | p (Holm) | "
        "share of the gap | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(summary):
        lines.append("| " + " | ".join(row) + " |")
    if notes := remarks(summary):
        lines += ["", *notes]
    return lines


def remarks(summary: Summary) -> list[str]:
    """What a reader of the table has to know besides, a sentence each."""
    found = []
    if summary.missing:
        found.append(f"Not finished: {summary.missing} of {summary.cells} cells are still to be run.")
    if len({tuple(arm.seeds) for arm in summary.arms}) > 1:
        found.append(
            "Not all arms have as many seeds: differences and shares are of the seeds that the arms have in "
            "common, Dice of all that each has."
        )
    return found


def rows(summary: Summary) -> list[list[str]]:
    """The cells of the table of arms, as text."""
    found = []
    for arm in summary.arms:
        title = arm.title + (f" ({arm.knew})" if arm.knew else "")
        comparator = arm.arm == summary.benchmark.comparator
        found.append(
            [
                "all" if arm.labelled is None else str(arm.labelled),
                title,
                str(arm.steps),
                str(len(arm.seeds)),
                interval(arm.dice),
                interval(arm.nsd),
                interval(arm.hd95, 2),
                "comparator" if comparator else interval(arm.gain, signed=True),
                "" if arm.holm is None else _p(arm.holm),
                interval(arm.share, 2),
                arm.verdict + _other_steps(summary, arm),
            ]
        )
    return found


def _other_steps(summary: Summary, arm: ArmFigures) -> str:
    """Said of an arm that is compared and had more or fewer steps than the comparator."""
    benchmark = summary.benchmark
    wanted = benchmark.total_steps(benchmark.arms[benchmark.comparator])
    return "" if arm.gain is None or arm.steps == wanted else f", with {arm.steps} steps instead of {wanted}"


def interval(figure: Interval | None, digits: int = 3, *, signed: bool = False) -> str:
    """A figure with its interval, as text."""
    if figure is None:
        return ""
    sign = "+" if signed else ""
    # Adding 0 turns -0.0 into 0.0.
    value, low, high = (f"{round(part, digits) + 0.0:{sign}.{digits}f}" for part in figure)
    return f"{value} [{low}, {high}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _csv(study: Study, cells: Sequence[Cell]) -> str:
    """Every score of every cell."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["arm", "labelled", "seed", "case", "patient", "label", "dice", "nsd", "hd95_mm"])
    for cell in cells:
        file = cell.file(study.work)
        if not file.exists():
            continue
        count = "all" if cell.labelled is None else cell.labelled
        for score in read_cell(file).scores:
            for label, dice in score.dice.items():
                figures = [dice, score.nsd[label], score.hd95[label]]
                shown = [f"{value:.5f}" for value in figures]
                writer.writerow([cell.arm, count, cell.seed, score.case, score.patient, label, *shown])
    return text.getvalue()


# -- sections ------------------------------------------------------------------------------------------------


def _head(summary: Summary) -> str:
    benchmark = summary.benchmark
    noted = " ".join(remarks(summary))
    noted = f'<p class="box">{noted}</p>' if noted else ""
    counts = " and ".join(map(str, benchmark.labelled))
    same = ", the same in all arms"
    if benchmark.backend == "nnunet":
        same = "; nnU-Net has no seed for the last two"
    return (
        f"<h1>Benchmark {escape(benchmark.name)}</h1><p>{escape(summary.network)} trained on {counts} "
        f"labelled cases of {escape(summary.dataset)} and scored on {summary.scored} {benchmark.subset} "
        f"cases of {summary.patients} other patients. Each seed draws its own labelled patients, initial "
        f"weights and augmentation{same}. Arms differ in what is named, and, except where it says so, have "
        f"the same classical augmentation.</p>{noted}"
    )


def _answers(summary: Summary) -> str:
    comparator = summary.benchmark.arms[summary.benchmark.comparator]
    wanted = summary.benchmark.total_steps(comparator)
    lines = []
    for arm in summary.arms:
        if arm.gain is None:
            continue
        words = {"gain": "raises Dice", "loss": "lowers Dice", "no gain": "shows no gain"}
        said = words.get(arm.verdict, f"says nothing yet ({arm.verdict})")
        share = ""
        if arm.share is not None and arm.verdict == "gain":
            share = f", {interval(arm.share, 2)} of the gap to all labels"
        steps = f"{steps}," if (steps := _other_steps(summary, arm)) else ""
        lines.append(
            f"<li>With {arm.labelled} labelled, <b>{escape(arm.title)}</b>{steps} {said}: "
            f"{interval(arm.gain, signed=True)}{share}.</li>"
        )
    title = escape(comparator.title or summary.benchmark.comparator)
    listed = "".join(lines)
    return f'<div class="box"><p>Against <b>{title}</b>, {wanted} steps in all:</p><ul>{listed}</ul></div>'


def _scores(summary: Summary) -> str:
    head = (
        "Labelled", "Arm", "Steps", "Seeds", "Dice", "NSD", "HD95, mm", "Dice beyond comparator",
        "p (Holm)", "Share of gap", "",
    )  # fmt: skip
    body = [[escape(cell) for cell in row] for row in rows(summary)]
    return (
        "<h2>All arms</h2>"
        + table(head, body)
        + '<p class="small">In brackets: 95 % intervals from 5000 draws of seeds and of patients, widened '
        "for few seeds. Gains are paired by case, on the seeds that both arms have. p: Wilcoxon's "
        "signed-rank test over patients, given these seeds, Holm-adjusted over the arms with as many "
        f"labelled cases. NSD: normalised surface distance at {summary.benchmark.tolerance:g} mm. "
        "Share of gap: gain over what all labels gain, with Fieller's interval. Verdicts are by the "
        "intervals, which are not adjusted for the number of arms.</p>"
    )


def _structures(summary: Summary) -> str:
    labels = list(summary.arms[0].by_label)
    body = [
        [
            "all" if arm.labelled is None else str(arm.labelled),
            escape(arm.title),
            *(f"{arm.by_label[label]:.3f}" for label in labels),
        ]
        for arm in summary.arms
    ]
    head = ("Labelled", "Arm", *(escape(label) for label in labels))
    return "<h2>Dice of each structure</h2>" + table(head, body)


def _margins(summary: Summary) -> str:
    if not summary.margins:
        return ""
    body = [
        [
            str(found.labelled),
            escape(_title(summary, found.arm)),
            escape(_title(summary, found.reference)),
            interval(found.difference, signed=True),
            f"{found.margin:g}",
            '<span class="pass">Yes</span>' if found.met else '<span class="unclear">Not shown</span>',
        ]
        for found in summary.margins
    ]
    head = ("Labelled", "Arm", "Reference", "Difference of Dice", "Margin", "Not worse by more than it")
    return "<h2>Is it as good as its reference?</h2>" + table(head, body)


def _title(summary: Summary, arm: str) -> str:
    return summary.benchmark.arms[arm].title or arm


def _efficiency(summary: Summary) -> str:
    if len(summary.benchmark.labelled) < 2:
        return ""
    return "<h2>Label efficiency</h2>" + picture(
        lambda figure: _draw_efficiency(figure, summary),
        (8, 4.5),
        "Mean Dice over the number of labelled cases; dashed: all labels.",
    )


def _worst(study: Study, summary: Summary, cells: Sequence[Cell]) -> str:
    """Montages of the cases with the lowest Dice of each arm's first seed: true and predicted labels."""
    parts = ["<h2>Worst cases</h2>"]
    files = {case.name: case for case in study.scored}
    for arm in summary.arms:
        cell = Cell(arm.labelled, arm.arm, arm.seeds[0])
        predictions = study.work / "predictions" / cell.file(Path()).relative_to("cells").with_suffix(".npz")
        if cell not in cells or not predictions.exists():
            continue
        scores = sorted(read_cell(cell.file(study.work)).scores, key=lambda score: score.mean())[:WORST]
        with np.load(predictions) as kept:
            loaded = [load_case(files[score.case]) for score in scores]
            true = [case.label for case in loaded]
            found = [kept[score.case] for score in scores]
        # Truth on the left and what was found on the right, in the same planes.
        names = [f"{score.case} true"[-22:] for score in scores]
        names += [f"{score.case} {score.mean():.2f}"[-22:] for score in scores]
        path = study.work / "cache" / "worst.png"
        montage(
            [case.image for case in loaded] * 2,
            [*true, *found],
            names,
            path,
            affines=[case.affine for case in loaded] * 2,
            names={number: study.dataset.labels[number] for number in study.labels},
            shown=[*true, *true],
        )
        labelled = "all" if arm.labelled is None else arm.labelled
        parts.append(embedded(path.read_bytes(), f"{arm.title}, {labelled} labelled, seed {arm.seeds[0]}"))
        path.unlink()
    return "".join(parts)


def _details(summary: Summary) -> str:
    settings = escape(summary.benchmark.model_dump_json(indent=1))
    licence = escape(summary.licence or "not stated")
    return (
        f"<h2>Details</h2><p>Generator {escape(summary.generator)}; licence of the scans: {licence}; torch "
        f"{torch.__version__}. All scores: cases.csv.</p><pre class='small'>{settings}</pre>"
    )


# -- figures -------------------------------------------------------------------------------------------------


def _size(summary: Summary) -> tuple[float, float]:
    return 10, 1.2 + 0.36 * len(summary.arms)


def draw_arms(figure: "Figure", summary: Summary) -> None:
    """Dice of each arm, and its difference from the comparator's."""
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    names = []
    for row, arm in enumerate(reversed(summary.arms)):
        labelled = "all" if arm.labelled is None else arm.labelled
        names.append(f"{arm.title} ({labelled})")
        left.plot(arm.by_seed, [row] * len(arm.by_seed), ".", color="0.6", markersize=4)
        _bar(left, arm.dice, row, "0.2")
        if arm.gain is not None:
            _bar(right, arm.gain, row, GAIN if arm.verdict == "gain" else NONE)
    left.set(yticks=range(len(names)), xlabel="Dice", title="Dice (labelled cases)")
    left.set_yticklabels(names, fontsize=8)
    right.axvline(0, color="0.2", linewidth=0.8)
    comparator = summary.benchmark.comparator
    right.set(xlabel="Dice", title=f"beyond {summary.benchmark.arms[comparator].title or comparator}")
    _limit(left, [arm.dice for arm in summary.arms])
    _limit(right, [arm.gain for arm in summary.arms if arm.gain is not None])
    for axes in (left, right):
        # Of numbers such as -0.125 no more fit beside each other.
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)


def _limit(axes: "Axes", figures: Sequence[Interval]) -> None:
    """Show all but the ends of intervals so wide that the others could not be told apart."""
    if not figures:
        return
    widths = [figure.high - figure.low for figure in figures]
    shown = [figure for figure, width in zip(figures, widths, strict=True) if width <= 5 * np.median(widths)]
    low = min([figure.low for figure in shown] + [figure.value for figure in figures])
    high = max([figure.high for figure in shown] + [figure.value for figure in figures])
    axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _bar(axes: "Axes", figure: Interval, row: int, colour: str) -> None:
    axes.plot([figure.low, figure.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(figure.value, row, "o", color=colour, markersize=5)


def _draw_efficiency(figure: "Figure", summary: Summary) -> None:
    axes = figure.subplots()
    by_arm: dict[str, list[ArmFigures]] = {}
    for arm in summary.arms:
        if arm.labelled is None:
            axes.axhline(arm.dice.value, color="0.5", linestyle="--", linewidth=1)
        else:
            by_arm.setdefault(arm.title, []).append(arm)
    for title, points in by_arm.items():
        counts = [point.labelled or 0 for point in points]
        axes.plot(counts, [point.dice.value for point in points], "o-", label=title, markersize=4)
    axes.set(xlabel="labelled cases", ylabel="Dice", xscale="log", xticks=summary.benchmark.labelled)
    axes.set_xticklabels([str(count) for count in summary.benchmark.labelled])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7)
