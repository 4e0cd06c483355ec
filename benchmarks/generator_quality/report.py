"""The table and the plots, made from the measured cells."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffaug.evaluation.statistics import Interval, mean_interval, ratio_interval
from diffaug.files import atomic_path, atomic_write_text

SHARE_OF_DEFAULT_STRENGTH = 0.985
LABEL_NAMES = {"label_1": "anterior", "label_2": "posterior"}
Results = dict[str, dict[str, Any]]


def write_report(folder: Path) -> None:
    """Write `table.md`, `vary.png` and `volumes.png` beside the cells of one subset, from what is there."""
    results = {
        file.relative_to(folder).with_suffix("").as_posix(): json.loads(file.read_text())["values"]
        for file in sorted(folder.rglob("*.json"))
    }
    if not results:
        return
    atomic_write_text(folder / "table.md", "\n".join(table(results, folder.name)) + "\n")
    curves = {kind: curve(results, kind) for kind in ("residual", "plain")}
    if "vary/originals" in results and all(curves.values()):
        plot_vary(results, curves, folder / "vary.png")
    if "volumes" in results:
        plot_volumes(results["volumes"], folder / "volumes.png")


def table(results: Results, subset: str) -> list[str]:
    """The lines of a Markdown table with every figure that can be computed from the cells at hand."""
    rows = [
        *latent_rows(results),
        *reconstruction_rows(results),
        *utility_rows(results),
        *paint_rows(results),
        *vary_rows(results),
        *operation_rows(results),
        *volume_rows(results),
        *neighbour_rows(results),
        *few_label_rows(results),
        *speed_rows(results),
    ]
    head = ["figure", "target", "measured", "real against real", "met"]
    return [
        f"Held-out cases: {subset}. Brackets: 95 % intervals over patients.",
        "",
        *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]),
    ]


# -------- rows


def latent_rows(results: Results) -> list[list[str]]:
    """Size of the latent."""
    found = results.get("latent")
    if found is None:
        return []
    share = found["latent_numbers"] / found["voxels"]
    measured = f"{share:.4f} ({found['latent_numbers']} of {found['voxels']})"
    return [["latent numbers a voxel", "at most 0.125", measured, "–", verdict(share <= 1 / 8)]]


def reconstruction_rows(results: Results) -> list[list[str]]:
    """PSNR, share of the Dice, round trip of the label map."""
    found = results.get("reconstruction")
    if found is None:
        return []
    patients = found["patients"]
    psnr = mean_interval(found["psnr_db"], patients)
    share = share_interval(found["dice_reconstruction"], found["dice_original"], patients)
    original = mean_interval(case_means(found["dice_original"]), patients)
    between = f"{found['psnr_between_patients_db']:.1f} dB between two patients"
    rows = [
        ["reconstruction, PSNR", "reported", f"{shown(psnr, 1)} dB", between, "–"],
        [
            "reconstruction, share of the judge's Dice",
            "at least 0.98",
            shown(share),
            f"1 (Dice on the originals {shown(original)})",
            verdict(share.value >= 0.98),
        ],
    ]
    if "dice_label_round_trip" in found:
        trip = mean_interval(case_means(found["dice_label_round_trip"]), patients)
        met = verdict(trip.value >= 0.97)
        rows.append(["label map, round trip, Dice", "at least 0.97", shown(trip), "1", met])
    return rows


def utility_rows(results: Results) -> list[list[str]]:
    """Segmenters trained on real and on sampled cases, and what doubling their steps adds."""
    arms = utility_arms(results)
    if not arms:
        return []
    base = min(steps for _, _, steps in arms)
    means = {arm: arm_mean(runs) for arm, runs in arms.items()}
    goal = means.get(("real", 32, base))
    rows = []
    for (kind, count, steps), runs in sorted(arms.items()):
        if steps != base:
            continue
        doubled = arms.get((kind, count, 2 * steps), [])
        mean = means[kind, count, steps]
        synthetic = kind == "synthetic"
        seeds = ", ".join(f"{np.mean(run['dice']):.4f}" for run in runs)
        pairs = "samples that the judge labelled" if "labelled_by" in runs[0] else "sampled pairs"
        rows.append(
            [
                f"trained on {count} {pairs if synthetic else 'real cases'}, Dice on real",
                "at least that of 32 real cases" if synthetic else "reported",
                f"{shown(mean)} (seeds {seeds})",
                f"32 real cases: {shown(goal)}" if synthetic and goal else "–",
                verdict(mean.value >= goal.value) if synthetic and goal else "–",
            ]
        )
        if doubled:
            # Seed by seed: fewer seeds than the arm has are trained twice as long.
            gain = arm_mean(doubled).value - arm_mean(runs[: len(doubled)]).value
            name = f"the same with {2 * steps} instead of {steps} steps"
            rows.append([name, "adds less than 0.003", f"{gain:+.4f}", "–", verdict(gain < 0.003)])
    return rows


def paint_rows(results: Results) -> list[list[str]]:
    """Share of the Dice on painted images."""
    found = results.get("paint")
    if found is None:
        return []
    share = share_interval(found["dice_painted"], found["dice_original"], found["patients"])
    met = verdict(0.95 <= share.value <= 1.02)
    return [["paint, share of the judge's Dice", "0.95 to 1.02", shown(share), "1", met]]


def vary_rows(results: Results) -> list[list[str]]:
    """The default strength that the curve suggests, its movement, and the control."""
    points = curve(results, "residual")
    if "vary/originals" not in results or not points:
        return []
    originals = results["vary/originals"]
    control = share_interval(originals["dice_shifted"], originals["dice"], originals["patients"])
    control_row = [
        "control: label shifted by one voxel",
        "visibly below 1",
        shown(control),
        "1 (label in place)",
        verdict(control.high < SHARE_OF_DEFAULT_STRENGTH),
    ]
    target = f"share at least {SHARE_OF_DEFAULT_STRENGTH}, movement at least 0.5"
    kept = [p for p in points if p["share"].value >= SHARE_OF_DEFAULT_STRENGTH]
    if not kept:
        return [["vary, largest strength", target, "no strength keeps the share", "–", "no"], control_row]
    best = kept[-1]
    measured = (
        f"strength {best['strength']}: share {shown(best['share'])}, movement {shown(best['movement'], 2)}"
    )
    return [
        [
            "vary, largest strength",
            target,
            measured,
            "share 1, movement 1",
            verdict(best["movement"].value >= 0.5),
        ],
        control_row,
    ]


def operation_rows(results: Results) -> list[list[str]]:
    """Share of the Dice on inpainted and repainted cases, and how far the label maps moved."""
    rows = []
    for name, found in results.items():
        if not name.startswith("operations/"):
            continue
        share = share_interval(found["dice"], found["dice_original"], found["patients"])
        shifted = share_interval(found["dice_shifted"], found["dice_original"], found["patients"])
        moved = mean_interval(case_means(found["dice_labels"]), found["patients"])
        what = name.removeprefix("operations/").replace("-", ", ", 1)
        changed = f"{100 * np.mean(found['changed']):.0f} % of voxels changed, Dice of new and old label map"
        rows.append(
            [
                f"{what}, share of the judge's Dice",
                "reported",
                f"{shown(share)} ({changed} {moved.value:.3f})",
                f"1 (label shifted by one voxel: {shown(shifted)})",
                "–",
            ]
        )
    return rows


def volume_rows(results: Results) -> list[list[str]]:
    """Kolmogorov-Smirnov statistics of the label volumes."""
    found = results.get("volumes")
    if found is None:
        return []
    rows = []
    for key, name in LABEL_NAMES.items():
        null = Interval(**found[key]["ks_null"])
        statistic = found[key]["ks"]
        what = f"volume of the {name} label, KS, {found['synthetic_cases']} against {found['real_cases']}"
        what += _judged(found)
        rows.append([what, "at most 0.20", f"{statistic:.3f}", shown(null), verdict(statistic <= 0.20)])
    return rows


def neighbour_rows(results: Results) -> list[list[str]]:
    """Preference for training cases, of samples and of other real cases."""
    found = results.get("neighbours")
    if found is None:
        return []
    rows = []
    for space in ("image", "label"):
        synthetic, real = (
            Interval(*(found[f"{space}_{kind}"][field] for field in Interval._fields))
            for kind in ("synthetic", "real")
        )
        training, held_out = len(found["training"]), len(found["held_out"])
        what = f"share nearer to {training} training than to {held_out} held-out cases, by {space}"
        what += _judged(found) if space == "label" else ""
        rows.append([what, "reported (0.5: none memorised)", shown(synthetic, 2), shown(real, 2), "–"])
    return rows


def _judged(found: dict[str, Any]) -> str:
    return ", labelled by the judge" if "labelled_by" in found else ""


def few_label_rows(results: Results) -> list[list[str]]:
    """Pretraining on sampled pairs against none, per seed and together."""
    rows = []
    differences, patients = [], []
    for name, scratch in results.items():
        match = re.fullmatch(r"few_labels/scratch-seed(\d+)", name)
        pretrained = results.get(f"few_labels/pretrained-seed{match[1]}") if match else None
        if match is None or pretrained is None:
            continue
        before, after = case_means(scratch["dice"]), case_means(pretrained["dice"])
        differences.append(after - before)
        patients = scratch["patients"]
        gain = shown(mean_interval(after - before, patients), sign=True)
        what = f"2 labelled cases, seed {match[1]}: scratch, pretrained, difference"
        rows.append([what, "reported", f"{before.mean():.4f}, {after.mean():.4f}, {gain}", "–", "–"])
    if len(differences) > 1:
        gain = shown(mean_interval(np.mean(differences, 0), patients), sign=True)
        rows.append([f"the same, mean of {len(differences)} seeds", "reported", gain, "–", "–"])
    return rows


def speed_rows(results: Results) -> list[list[str]]:
    """Seconds a volume, where they go, and memory."""
    rows = []
    for verb, target in (("sample", 0.5), ("vary", 0.4), ("vary-resampled", 0.4)):
        found = results.get(f"speed/{verb}")
        if found is None:
            continue
        total = found["seconds_per_volume"]
        parts = ", ".join(
            f"{name} {spent / total:.0%}"
            for name, spent in found["parts_seconds_per_volume"].items()
            if spent > 0
        )
        fraction, full = found["fraction_of_matrix_product_rate"], found["matrix_product_gflop_per_s"]
        rate = f"{fraction:.0%} of {full:.0f} GFLOP/s"
        measured = f"{total:.2f} s on {found['threads']} threads ({parts}; {rate})"
        name = f"{verb.replace('-', ', ')}, seconds a volume, batch {found['batch']}, {found['steps']} steps"
        rows.append([name, f"at most {target}", measured, "–", verdict(total <= target)])
    memory = results.get("speed/memory")
    if memory:
        peaks = memory["peak_mib_by_cases"]
        shown_peaks = ", ".join(f"{count} cases {peak:.0f} MiB" for count, peak in peaks.items())
        flat = max(peaks.values()) <= 1.05 * min(peaks.values())
        rows.append(
            ["peak memory of building", "flat in the number of cases", shown_peaks, "–", verdict(flat)]
        )
    return rows


# -------- numbers


def case_means(dice: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean over the labels, per case."""
    return np.asarray(dice, float).mean(1)


def share_interval(
    part: Sequence[Sequence[float]], whole: Sequence[Sequence[float]], patients: Sequence[str]
) -> Interval:
    """Mean Dice as a share of another mean Dice of the same cases."""
    return ratio_interval(case_means(part), case_means(whole), patients)


def utility_arms(results: Results) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """The runs of each kind, number of cases and number of steps, in the order of their seeds."""
    arms: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for name, values in results.items():
        match = re.fullmatch(r"utility/(real|synthetic)-(\d+)-seed\d+-steps(\d+)", name)
        if match:
            arms.setdefault((match[1], int(match[2]), int(match[3])), []).append(values)
    return arms


def arm_mean(runs: Sequence[dict[str, Any]]) -> Interval:
    """Mean Dice over cases and seeds; the interval is over patients, the seeds of a case averaged."""
    return mean_interval(np.mean([case_means(run["dice"]) for run in runs], 0), runs[0]["patients"])


def curve(results: Results, kind: str) -> list[dict[str, Any]]:
    """Share of the Dice, its control and movement against strength, from the weakest."""
    originals = results.get("vary/originals")
    if originals is None:
        return []
    distance = float(np.median(originals["distances_between_patients"]))
    points = []
    for name, found in results.items():
        match = re.fullmatch(rf"vary/{kind}-(.+)", name)
        if match:
            patients = found["patients"]
            movement = mean_interval(np.asarray(found["movement"]) / distance, patients)
            points.append(
                {
                    "strength": float(match[1]),
                    "share": share_interval(found["dice"], originals["dice"], patients),
                    "control": share_interval(found["dice_shifted"], originals["dice"], patients),
                    "movement": movement,
                }
            )
    return sorted(points, key=lambda point: point["strength"])


def shown(interval: Interval, digits: int = 4, sign: bool = False) -> str:
    """`value [low, high]`."""
    style = f"{'+' if sign else ''}.{digits}f"
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"


def verdict(met: bool) -> str:
    """Whether a target is met."""
    return "yes" if met else "no"


# -------- plots


def plot_vary(results: Results, curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Share of the judge's Dice against strength and against movement."""
    import matplotlib.pyplot as plt

    originals = results["vary/originals"]
    control = share_interval(originals["dice_shifted"], originals["dice"], originals["patients"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, key, label in (
        (axes[0], "strength", "strength"),
        (axes[1], "movement", "movement (1: distance between two patients)"),
    ):
        for kind, colour in (("residual", "tab:blue"), ("plain", "tab:orange")):
            points = curves[kind]
            x = [point[key] if key == "strength" else point[key].value for point in points]
            shares = [point["share"] for point in points]
            axis.plot(x, [share.value for share in shares], "o-", color=colour, label=f"vary, {kind}")
            axis.fill_between(
                x, [share.low for share in shares], [share.high for share in shares], color=colour, alpha=0.15
            )
        axis.axhline(1, color="black", lw=0.8, label="originals")
        axis.axhline(
            SHARE_OF_DEFAULT_STRENGTH, color="black", lw=0.8, ls="--", label=f"{SHARE_OF_DEFAULT_STRENGTH}"
        )
        axis.axhline(
            control.value, color="tab:red", lw=0.8, ls=":", label="originals, label shifted by one voxel"
        )
        axis.set_xlabel(label)
    axes[0].set_ylabel("Dice, share of that on the originals")
    axes[0].legend(fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def plot_volumes(found: dict[str, Any], file: Path) -> None:
    """Histograms of the label volumes, real and sampled."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(LABEL_NAMES), figsize=(10, 3.5), layout="constrained")
    for axis, (key, name) in zip(axes, LABEL_NAMES.items(), strict=True):
        real, synthetic = found[key]["real_mm3"], found[key]["synthetic_mm3"]
        bins = np.histogram_bin_edges([*real, *synthetic], 30)
        for values, label in ((real, f"{len(real)} real"), (synthetic, f"{len(synthetic)} sampled")):
            axis.hist(values, bins, density=True, histtype="stepfilled", alpha=0.45, label=label)
        axis.set_xlabel(f"volume of the {name} label (mm³)")
        axis.set_yticks([])
        axis.legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
