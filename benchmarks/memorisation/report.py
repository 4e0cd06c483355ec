"""The table and the curve, made from the measured audits.

python benchmarks/memorisation/report.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffaug.audit.verdicts import MOST_BALANCE
from diffaug.files import atomic_path, atomic_write_text

HERE = Path(__file__).parent
# The bundled generator, and what the names of generators of its training have in common.
NAME = "hippocampus-mr"
STEP = "-step-"
# In the names of those that were sampled with another guidance.
GUIDED = "-guidance-"
KINDS = {"plain": "as sampled", "rejected": "copies rejected"}
COLOURS = {"encoder": "#0072b2", "intensities": "#e69f00"}

Result = dict[str, Any]


def main() -> None:
    """Write `table.md` and `curve.png` of each subset, from what is there."""
    gaps = [json.loads(file.read_text()) for file in sorted(HERE.glob("results/gap/*.json"))]
    gaps = sorted((gap for gap in gaps if of_curve(gap)), key=lambda gap: gap["generator"]["steps"])
    for subset in ("validation", "test"):
        folder = HERE / "results" / subset
        if results := read_results(folder):
            atomic_write_text(folder / "table.md", "\n".join(table(results)) + "\n")
            plot_curve(results, gaps, folder / "curve.png")


def read_results(folder: Path) -> list[Result]:
    """What was measured of each generator: audits by kind, Dice by the cases and steps of a segmenter.
    Those of the bundled generator's training come first, by their steps."""
    found: dict[str, Result] = {}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        own = content["generator"]
        result = found.setdefault(own["name"], {"generator": own, "dice": {}})
        if "dice" in content:
            result["dice"][content["cases"], content["steps"]] = content["dice"]
        else:
            result[content["kind"]] = content["report"]
    whole = [result for result in found.values() if all(kind in result for kind in KINDS)]
    return sorted(whole, key=lambda r: (not of_curve(r), r["generator"]["steps"]))


def of_curve(result: Result) -> bool:
    """Whether a generator is of the bundled one's training, sampled as that is."""
    name = result["generator"]["name"]
    return GUIDED not in name and (name == NAME or name.startswith(NAME + STEP))


def table(results: list[Result]) -> list[str]:
    """The lines of a Markdown table."""
    head = [
        *("generator", "steps", "samples", "clear copies", "suspected"),
        *("balance, encoder", "balance, intensities", "membership, encoder", "membership, intensities"),
        *("training scans matched (null)", "privacy", "Dice (cases; steps)"),
    ]
    rows = [row(result, kind) for result in results for kind in KINDS]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def row(result: Result, kind: str) -> list[str]:
    """The cells of one audit."""
    generator, report = result["generator"], result[kind]
    memorisation = {space["name"]: space["memorisation"] for space in report["spaces"]}
    own = memorisation["encoder"]
    dice = result["dice"] if kind == "rejected" else {}
    return [
        generator["name"],
        f"{generator['steps']}",
        KINDS[kind],
        str(report["copies"]["clear_copies"]),
        f"{report['copies']['copies']} of {report['synthetic']['cases']}",
        *(interval(memorisation[space]["balance"], 2) for space in COLOURS),
        *(interval(memorisation[space]["membership_auc"], 2) for space in COLOURS),
        f"{own['memorised_share']:.3f} ({own['memorised_null']:.3f})",
        ", ".join(v["answer"] for v in report["verdicts"] if v["about"] == "privacy"),
        "; ".join(f"{interval(f, 3)} ({cases}; {steps})" for (cases, steps), f in sorted(dice.items())),
    ]


def interval(figure: dict[str, float], digits: int) -> str:
    """A figure with its interval."""
    value, low, high = (f"{figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def plot_curve(results: list[Result], gaps: list[Result], path: Path) -> None:
    """Memorisation and utility over the steps of one training."""
    curve = [result for result in results if of_curve(result)]
    if not curve:
        return
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    gap, balance, membership, dice = figure.subplots(1, 4)
    for n, level in enumerate([found["level"] for found in gaps[0]["levels"]] if gaps else []):
        points = [(one["generator"]["steps"], 100 * one["levels"][n]["excess"]) for one in gaps]
        gap.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"noise level {level}")
    gap.axhline(0, color="0.4", linewidth=0.8)
    gap.set(title="the denoiser's own error", ylabel="% larger on scans that it did not see")
    for axes, name in ((balance, "balance"), (membership, "membership_auc")):
        for kind, style in (("plain", "--"), ("rejected", "-")):
            for space, points in over_steps(curve, kind, name):
                label = f"{'raw intensities' if space == 'intensities' else space}, {KINDS[kind]}"
                draw(axes, points, COLOURS[space], style, label)
        axes.axhline(0.5, color="0.4", linewidth=0.8)
    balance.axhline(MOST_BALANCE, color="#a33100", linewidth=0.8, linestyle=":")
    balance.set(title="balance (0.5: nothing memorised)", ylabel="share nearer to training scans")
    membership.set(title="membership inference", ylabel="area under the curve")
    scored = [(r["generator"]["steps"], r["dice"][min(r["dice"])]) for r in curve if r["dice"]]
    if scored:
        cases, steps = min(min(r["dice"]) for r in curve if r["dice"])
        draw(dice, scored, "#009e73", "-", f"{cases} samples, copies rejected; {steps} steps")
    dice.set(title="a U-Net trained on samples alone", ylabel="Dice on held-out scans")
    for axes in (gap, balance, membership, dice):
        axes.set_xlabel("training steps of the denoiser")
        axes.legend(frameon=False, fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def over_steps(
    curve: list[Result], kind: str, name: str
) -> Iterator[tuple[str, list[tuple[int, dict[str, float]]]]]:
    """A figure of each feature space with the steps that it belongs to."""
    for space in COLOURS:
        yield (
            space,
            [
                (result["generator"]["steps"], found["memorisation"][name])
                for result in curve
                for found in result[kind]["spaces"]
                if found["name"] == space
            ],
        )


def draw(axes: Axes, points: list[tuple[int, dict[str, float]]], colour: str, style: str, label: str) -> None:
    """A line with its intervals."""
    steps = [step for step, _ in points]
    values, low, high = ([figure[name] for _, figure in points] for name in ("value", "low", "high"))
    axes.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    if style == "-":
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
