"""The report as one HTML page: figures embedded, nothing fetched, fit for print."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffaug.audit.features import MIRROR, Space
from diffaug.audit.record import Beside, CopyRecord, Report, SetRecord, Suspect
from diffaug.audit.record import Figure as Interval
from diffaug.audit.verdicts import LIMITS
from diffaug.audit.volumes import LEVELS, CaseSet, Sets
from diffaug.evaluation.distributions import principal_components
from diffaug.evaluation.embedding import MIRRORED
from diffaug.pages import picture, table, write_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Suspected copies that are shown; the JSON lists all.
MOST_SHOWN = 40
COLOURS = {"synthetic": "#d55e00", "training": "#0072b2", "held-out": "#009e73"}
WORDS = {"pass": "Pass", "unclear": "Unclear", "fail": "Fail"}
PRIVACY = {
    "pass": "Nothing was found that speaks against sharing. That is evidence, not proof: see the last "
    "section.",
    "unclear": "Nothing speaks against sharing so far, but with so few held-out patients that says little.",
    "fail": "Do not share this data before you know why it failed a question, and what that means for those "
    "whose scans trained the generator:",
}
USE = {
    "pass": "The samples are as true to life, and as varied, as scans, by what was measured.",
    "unclear": "The samples differ from scans in something: see below in what, and whether it matters to "
    "you.",
    "fail": "Do not train on this data before you have looked at what differs.",
}
PATIENTS = (
    "Each answer stands alone: of generators that memorised nothing up to 15 % fail one of the questions "
    "about privacy by chance. How much can be said depends on the number of held-out patients."
)
# For readers who are no statisticians.
TERMS = {
    "interval": "What stands in brackets: the range that holds the true value in 19 of 20 audits. Wide ones "
    "come from few patients.",
    "held-out scan": "A scan of a patient whom the generator never saw. What it gets, an honest sample may "
    "get, too.",
    "encoder": "A network that was trained to tell scans apart and to know an altered copy for its original. "
    "Raw intensities compare the brightness of voxels, without any training.",
    "similarity": "A correlation: 1 for equal cases, 0 for unrelated ones.",
    "N_mem, tau": "Training scans with a sample more like them than tau, which only 1 in 20 training scans "
    "reaches with held-out scans.",
    "balance": "Of the samples, those whose nearest scan is a training scan rather than a held-out one, with "
    "as many of each: 50 % if the generator treats both alike.",
    "membership inference": "A test that guesses who was in the training set by how near the nearest sample "
    "is. Area under the curve: 0.5 for guessing blindly, 1 for being always right.",
    "authentic": "A sample farther from its nearest training scan than that scan is from another patient's.",
    "precision, recall": "Share of the samples that lie among scans, and of scans that lie among samples.",
    "density, coverage": "The same two, by neighbours that outliers disturb less.",
    "Frechet distance, MMD": "How far two clouds of cases are apart; 0 for equal ones.",
    "KS": "Largest difference between two cumulative curves, as in the last figures: 0 for equal "
    "distributions, 1 for those that do not overlap.",
    "MS-SSIM": "How alike two volumes look, 1 for equal ones. Samples that are all alike have a higher one "
    "than scans.",
}


def write_page(
    report: Report, spaces: Sequence[Space], sets: Sets, labels: Sequence[str], path: Path
) -> None:
    """Write the page, whole or not at all."""
    parts = [
        _head(report),
        _verdicts(report),
        _compared(report),
        _memorisation(report, spaces),
        _suspects(report, sets),
        _fidelity(report, spaces, sets, labels),
        _limits(),
        _terms(),
        _details(report),
    ]
    write_html(f"Audit of {report.synthetic.name}", parts, path)


# -------- sections


def _head(report: Report) -> str:
    cases = f"{report.synthetic.cases} synthetic cases"
    privacy, use = report.answer_about("privacy"), report.answer_about("use")
    failed = [v.question for v in report.verdicts if (v.about, v.answer) == ("privacy", "fail")]
    return (
        f"<h1>Audit of {escape(report.synthetic.name)}</h1>\n<p>{cases}, compared with "
        f"{report.training.cases} scans that trained their generator and {report.held_out.cases} scans of "
        f'other patients.</p>\n<div class="box"><p>{_answer(privacy)} <b>Privacy.</b> {PRIVACY[privacy]} '
        f"{escape(' '.join(failed))}</p><p>{_answer(use)} <b>Use.</b> {USE[use]}</p></div>"
        '<p class="small">This page and report.json name real scans and show those that suspected copies '
        "resemble: they stay with those who may see these scans.</p>"
    )


def _verdicts(report: Report) -> str:
    rows = [
        (_answer(v.answer), f"<b>{escape(v.question)}</b><br>{escape(v.found)}", escape(v.threshold))
        for v in report.verdicts
    ]
    return (
        "<h2>Questions and answers</h2>"
        + table(("Answer", "Question, and what was found", "Threshold"), rows)
        + f'<p class="small">{PATIENTS} Words are explained under Terms, further below.</p>'
    )


def _compared(report: Report) -> str:
    def row(role: str, record: SetRecord) -> tuple[str, ...]:
        patients = "not given" if record.patients is None else str(record.patients)
        return role, escape(record.name), str(record.cases), patients, escape(record.licence or "not stated")

    rows = [
        row("synthetic cases, which are audited", report.synthetic),
        row("training scans, which the generator saw", report.training),
        row("held-out scans, which it did not see", report.held_out),
    ]
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    sides = " x ".join(f"{n}" for n in report.grid.shape)
    spacing = " x ".join(f"{s:.3g}" for s in report.grid.spacing)
    return (
        "<h2>What was compared</h2>"
        + table(("Role", "Dataset", "Cases", "Patients", "Licence"), rows)
        + f"<p>All volumes were brought to one grid ({sides} voxels of {spacing} mm) and to zero mean and "
        "unit variance. A held-out scan is what an honest generator's sample should be like: of nobody in "
        "the training set, and yet true anatomy. So each figure of the samples stands beside the same "
        "figure of held-out "
        "scans.</p>" + notes
    )


def _memorisation(report: Report, spaces: Sequence[Space]) -> str:
    copies = report.copies
    rows: list[tuple[str, ...]] = [
        (
            "<b>clear copies</b>: by intensities, three times as near as the nearest of all held-out scans",
            str(copies.clear_copies),
            "",
        ),
        (
            "<b>suspected copies</b>: more like a training scan than nearly all held-out scans are",
            f"{copies.copies}, of {copies.training_cases} training scans of {copies.training_patients} "
            f"patients",
            "",
        ),
    ]
    rows += [
        (
            f"found by {escape(s.title)}",
            f"{s.copies} suspected" + ("" if s.clear_threshold is None else f", {s.clear_copies} clear"),
            f"{s.expected:.1%} suspected on average, {s.most:.1%} at most",
        )
        for s in copies.searches
    ]
    for space in report.spaces:
        m = space.memorisation
        rows += [
            (f"<b>{escape(space.title)}</b>", "", ""),
            (
                f"training scans with a match (N_mem, {m.matched} candidates, tau {m.tau:.3f})",
                f"{m.memorised_share:.1%}",
                f"{m.memorised_null:.1%}",
            ),
            (
                "nearer to training than to held-out scans (balance)",
                _percent(m.balance),
                f"50 %; nothing but copies: {m.balance_of_copies:.0%}",
            ),
            ("authentic samples", f"{m.authentic_share:.1%}", f"{m.authentic_null:.1%}"),
            (
                "distance to the nearest patient over that to the second nearest (median)",
                f"{m.neighbour_ratio:.3f}",
                f"{m.neighbour_ratio_null:.3f}",
            ),
            ("membership inference, area under the curve", str(m.membership_auc), "0.5"),
        ]
    return (
        "<h2>Does the data copy its training scans?</h2>"
        + table(("Figure", "Samples", "Held-out scans, or chance"), rows)
        + picture(
            lambda figure: _draw_matches(figure, copies, spaces),
            (4.6 * len(spaces), 3.2),
            "How much each case is like its nearest training scan. A generator that copies has samples to "
            "the right of all held-out scans. Lines: a suspected copy (full), a clear copy (dotted).",
        )
    )


def _suspects(report: Report, sets: Sets) -> str:
    found = report.suspects[:MOST_SHOWN]
    if not found:
        return "<h2>Suspected copies</h2><p>None.</p>"
    rows = [
        (
            str(n + 1),
            escape(s.synthetic),
            escape(s.training),
            s.search,
            f"{s.similarity:.3f}",
            "yes" if s.clear else "",
        )
        for n, s in enumerate(found)
    ]
    more = len(report.suspects) - len(found)
    return (
        "<h2>Suspected copies, the most alike first</h2>"
        + picture(
            lambda figure: _draw_pairs(figure, found, sets),
            (9.6, 1.65 * len(found) + 0.3),
            "Each suspected sample (left three slices) and the training scan that it resembles (right "
            "three; its mirror image where that was found alike), through the middle of the volume, numbered "
            "as in the table below. Judge for yourself: the same person, or only the same organ?",
        )
        + table(("", "Sample", "Training scan", "Found by", "Similarity", "Clear"), rows)
        + (f"<p>{more} more are listed in report.json.</p>" if more else "")
    )


def _fidelity(report: Report, spaces: Sequence[Space], sets: Sets, labels: Sequence[str]) -> str:
    rows: list[tuple[str, ...]] = []
    for space in report.spaces:
        rows.append((f"<b>{escape(space.title)}</b>, at most 16 components", "", ""))
        rows += [_pair(name.replace("_", " "), b) for name, b in space.distributions.items()]
    rows.append(("<b>distributions</b>", "", ""))
    rows += [_pair(_worded(name), beside) for name, beside in report.measures.items()]
    s = report.similarity
    rows.append(
        _pair(f"MS-SSIM of {s.pairs} pairs ({s.scales} scales, windows of {s.kernel} voxels)", s.ms_ssim)
    )
    page = (
        "<h2>Are the samples true to life, and varied?</h2><p>Samples, and training scans in their place, "
        "compared with equally many held-out scans; 95 % intervals over patients.</p>"
        + table(("Figure", "Samples", "Training scans"), rows)
        + picture(
            lambda figure: _draw_components(figure, spaces),
            (4.6 * len(spaces), 3.6),
            "The first two principal components of the training scans.",
        )
        + picture(
            lambda figure: _draw_measures(figure, sets, labels),
            (4.6 * (2 + len(labels)), 3.2),
            "Intensities, how alike neighbouring slices are (high means smooth), and volumes of the labelled "
            "structures.",
        )
    )
    if report.utility is not None:
        u = report.utility
        page += f"<h3>Utility: Dice of a U-Net ({u.steps} steps)</h3>" + table(
            ("Trained on", "Tested on", "Dice"),
            [
                (
                    f"{u.training_cases} synthetic",
                    "held-out scans",
                    str(u.trained_on_synthetic_tested_on_real),
                ),
                ("training scans", "held-out scans", str(u.trained_on_real_tested_on_real)),
                ("training scans", "synthetic", str(u.trained_on_real_tested_on_synthetic)),
            ],
        )
    return page


def _limits() -> str:
    return (
        "<h2>What this audit cannot show</h2><ul>"
        + "".join(f"<li>{escape(limit)}</li>" for limit in LIMITS)
        + "</ul>"
    )


def _terms() -> str:
    return "<h2>Terms</h2>" + table(("Term", "Meaning"), [(escape(t), escape(m)) for t, m in TERMS.items()])


def _details(report: Report) -> str:
    hashes = [
        (role, f"<code>{record.files}</code>")
        for role, record in (
            ("synthetic", report.synthetic),
            ("training", report.training),
            ("held-out", report.held_out),
        )
    ]
    return (
        f"<h2>How it was done</h2><p>Encoder: {escape(report.encoder)} (Dar et al., arXiv 2402.01054); "
        "tau is a 95th percentile; authenticity after Alaa et al. 2022, precision and recall after "
        "Kynkaanniemi et al. 2019, density and coverage after Naeem et al. 2020, MMD after Gretton et al. "
        "2012, MS-SSIM after Wang et al. 2003. Intervals of the balance come from random exchanges of "
        "patients between the sides, of other distributions from half-samples (Shao and Wu 1989). diffaug "
        f"{escape(report.version)}. All figures are in report.json.</p>"
        + table(("Set", "SHA-256 of its files on the grid"), hashes)
    )


# -------- pieces


def _answer(answer: str) -> str:
    return f'<span class="{answer}">{WORDS[answer]}</span>'


def _pair(name: str, beside: Beside) -> tuple[str, ...]:
    return escape(name), str(beside.synthetic), str(beside.real)


def _worded(name: str) -> str:
    if name == "intensities":
        return "intensities (Wasserstein distance, standard deviations)"
    if name == "roughness":
        return "change between neighbouring slices, in that of held-out scans"
    if name.startswith("volume_"):
        return f"volume of {name.removeprefix('volume_')} (KS)"
    return f"slice consistency along {name[-1]} (KS)"


def _percent(figure: Interval) -> str:
    return f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]"


def _draw_matches(figure: "Figure", copies: CopyRecord, spaces: Sequence[Space]) -> None:
    panels = figure.subplots(1, len(spaces), squeeze=False)[0]
    searches = {search.name: search for search in copies.searches}
    for axes, space in zip(panels, spaces, strict=True):
        found = searches[space.name]
        best = {
            "held-out": space.searches[0].similarities.held_out.max(1),
            "synthetic": space.searches[0].similarities.synthetic.max(1),
        }
        bins = np.linspace(min(map(np.min, best.values())), 1, 41)
        for name, values in best.items():
            weights = np.full(len(values), 100 / len(values))
            axes.hist(values, bins, weights=weights, color=COLOURS[name], alpha=0.55, label=name)
        axes.axvline(found.threshold, color="0.2", linewidth=1)
        if found.clear_threshold is not None:
            axes.axvline(found.clear_threshold, color="0.2", linewidth=1, linestyle=":")
        axes.set(title=space.title, xlabel="similarity to the nearest training scan", ylabel="% of cases")
        axes.legend(frameon=False)


def _draw_pairs(figure: "Figure", suspects: Sequence[Suspect], sets: Sets) -> None:
    panels = figure.subplots(len(suspects), 6, squeeze=False)
    for number, (row, suspect) in enumerate(zip(panels, suspects, strict=True), 1):
        sample = _volume(sets.synthetic, suspect.synthetic)
        scan = _volume(sets.training, suspect.training)
        # Names are too long for a picture: rows have the numbers of the table below.
        title = f"{number}: training scan"
        if suspect.search.endswith(MIRROR):
            scan, title = _mirrored_like(scan, sample), f"{title}, mirrored"
        for offset, volume, name in ((0, sample, f"{number}: sample"), (3, scan, title)):
            for axis in range(3):
                _slice(row[offset + axis], volume, axis)
            row[offset].set_title(name, fontsize=8, loc="left")


def _volume(cases: CaseSet, name: str) -> np.ndarray:
    """The first channel `(I, J, K)` of a case."""
    return np.asarray(cases.images[cases.names.index(name)][0], dtype=np.float32)


def _mirrored_like(scan: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The mirror image of a scan `(I, J, K)` that is most like the sample."""
    images = [np.flip(scan, tuple(axis - 2 for axis in axes)) for axes in MIRRORED]
    return max(images, key=lambda image: float((image * sample).sum()))


def _slice(axes: "Axes", volume: np.ndarray, axis: int) -> None:
    image = volume.take(volume.shape[axis] // 2, axis=axis).T
    axes.imshow(image, cmap="gray", origin="lower", vmin=-2, vmax=2.5)
    axes.set_axis_off()


def _draw_components(figure: "Figure", spaces: Sequence[Space]) -> None:
    panels = figure.subplots(1, len(spaces), squeeze=False)[0]
    for axes, space in zip(panels, spaces, strict=True):
        components = principal_components(space.training, 2)
        for name, features in (
            ("training", space.training),
            ("held-out", space.held_out),
            ("synthetic", space.synthetic),
        ):
            x, y = components.project(features)[:, :2].T
            axes.scatter(x, y, s=9, alpha=0.6, color=COLOURS[name], label=name, linewidths=0)
        axes.set(title=space.title, xlabel="component 1", ylabel="component 2", xticks=[], yticks=[])
        axes.legend(frameon=False)


def _draw_measures(figure: "Figure", sets: Sets, labels: Sequence[str]) -> None:
    panels = figure.subplots(1, 2 + len(labels), squeeze=False)[0]
    named: list[tuple[str, CaseSet]] = [
        ("training", sets.training),
        ("held-out", sets.held_out),
        ("synthetic", sets.synthetic),
    ]
    for name, cases in named:
        panels[0].plot(100 * LEVELS, cases.intensities.mean((0, 1)), color=COLOURS[name], label=name)
        _distribution(panels[1], cases.consistency.mean(1), name)
        for axes, label in zip(panels[2:], labels, strict=True):
            volumes = cases.label_volumes[label]
            _distribution(axes, volumes[np.isfinite(volumes)], name)
            axes.set(title=f"volume of {label}", xlabel="mm³", ylabel="share below")
    panels[0].set(title="intensities", xlabel="percentile of voxels", ylabel="standard deviations")
    panels[1].set(
        title="slice consistency", xlabel="correlation of neighbouring slices", ylabel="share below"
    )
    panels[0].legend(frameon=False)


def _distribution(axes: "Axes", values: np.ndarray, name: str) -> None:
    axes.step(np.sort(values), (np.arange(len(values)) + 1) / len(values), where="post", color=COLOURS[name])
