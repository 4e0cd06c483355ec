"""Plain answers: what an audit's figures mean, by stated thresholds."""

from collections.abc import Mapping, Sequence

from diffaug.audit.record import (
    Answer,
    Beside,
    CopyRecord,
    Figure,
    Memorisation,
    PairSimilarity,
    SpaceReport,
    Verdict,
    worst,
)

# Largest upper bound of the balance, and of an attacker's area under the curve, that passes.
MOST_BALANCE = MOST_AUC = 0.60
# Share of copies that a search may leave unnoticed, as chance explains it, and still pass.
MOST_HIDDEN = 0.2
# A share of real cases' precision or coverage that passes, and one below which it fails.
ENOUGH, TOO_LITTLE = 0.8, 0.5
# Frechet distances, in those of real cases, that pass and above which fidelity fails.
NEAR, FAR = 2.0, 10.0
# Change between neighbouring slices, in that of real cases or the reverse, above which fidelity fails.
ROUGH = 4.0
# What samples' distances of distributions (KS) may exceed real ones' by, and above which they fail.
CLOSE, APART = 0.15, 0.4
# Structural similarity that pairs of samples may have beyond pairs of real cases.
ALIKE = 0.05

LIMITS = (
    "An audit compares samples with the scans that it was given. It proves no privacy: there is no formal "
    "guarantee, such as differential privacy gives.",
    "Other samples of the same generator may be copies though none of these is.",
    "Copies of a part of a scan, of a rare feature, or of an alteration that the encoder was not trained to "
    "see through can go unnoticed. So can altered copies that are not clear, as long as no search has more "
    "suspected ones than chance explains: look at the pictures.",
    "An attacker who has the generator's weights, rather than samples alone, can try more than was tried "
    "here.",
    "Whether a person can be recognised by what is true of their anatomy, copied or not, is for people to "
    "judge. So are consent, licence and law.",
)


def copy_verdict(copies: CopyRecord, samples: int) -> Verdict:
    """Are there copies of training cases among the samples?"""
    exceeding = [s for s in copies.searches if s.copies > s.most * samples + 0.5]
    hidden = max(search.most for search in copies.searches)
    answer: Answer = "pass" if hidden <= MOST_HIDDEN else "unclear"
    if copies.clear_copies or exceeding:
        answer = "fail"
    found = "; ".join(
        f"{s.copies} by {s.title} (an honest generator: up to {s.most * samples:.0f})"
        for s in copies.searches
    )
    return Verdict(
        question="Are there copies of training scans among the samples?",
        about="privacy",
        answer=answer,
        found=f"{copies.clear_copies} clear copies; {copies.copies} of {samples} samples are suspected: "
        f"{found}",
        threshold="pass: no clear copy, and no search with more suspected ones than chance explains, which "
        "altered copies may hide among; fail: a clear copy, or more suspected ones; unclear: with so few "
        f"held-out patients chance could explain more than {MOST_HIDDEN:.0%}",
    )


def balance_verdict(memorisation: Sequence[tuple[str, Memorisation]]) -> Verdict:
    """Do the samples lean towards the training cases?"""
    answers: list[Answer] = []
    for _, found in memorisation:
        # Half of what nothing but copies would give.
        telling = 0.5 + (found.balance_of_copies - 0.5) / 2
        answer = _chance(found.balance, min(MOST_BALANCE, telling))
        # Below one half the two sets differ in more than who was used: the comparison says nothing.
        answers.append("unclear" if found.balance.high < 0.5 else answer)
    first = memorisation[0][1]
    return Verdict(
        question="Do the samples lie nearer to the training scans than to others?",
        about="privacy",
        answer=worst(answers),
        found="; ".join(f"{_percent(found.balance)} by {title}" for title, found in memorisation)
        + f" are nearer to training scans, of {first.balance_cases:.0f} on each side; nothing but copies "
        f"would give {first.balance_of_copies:.0%}",
        threshold=f"50 % is none; pass: the interval holds 50 %, ends at {MOST_BALANCE:.0%} or less and "
        "below half of what nothing but copies would give; fail: it lies above 50 %; unclear: too few "
        "held-out patients to tell, or it lies below 50 %, as where the two sets of scans differ",
    )


def membership_verdict(memorisation: Sequence[tuple[str, Memorisation]]) -> Verdict:
    """Can an attacker tell who was in the training set?"""
    figures = [(title, found.membership_auc) for title, found in memorisation]
    return Verdict(
        question="Can somebody who holds a scan tell from the samples whether it was used for training?",
        about="privacy",
        # Who can tell by nearness can tell by distance.
        answer=worst(["fail" if f.high < 0.5 else _chance(f, MOST_AUC) for _, f in figures]),
        found="; ".join(f"area under the curve {figure} by {title}" for title, figure in figures),
        threshold=f"0.5 is guessing; pass: the interval holds 0.5 and ends at {MOST_AUC:.2f} or less; fail: "
        "it lies above or below 0.5; unclear: too few held-out patients to tell",
    )


def fidelity_verdict(spaces: Sequence[SpaceReport], measures: Mapping[str, Beside]) -> Verdict:
    """Do the samples look like scans?"""
    answers: list[Answer] = []
    words = []
    for space in spaces:
        precision, distance = space.distributions["precision"], space.distributions["frechet_distance"]
        answers += [_enough(precision), _near(distance)]
        words.append(
            f"by {space.title} precision {precision.synthetic.value:.2f} (real {precision.real.value:.2f}), "
            f"Frechet distance {distance.synthetic.value:.2g} ({distance.real.value:.2g})"
        )
    consistency = [beside for name, beside in measures.items() if name.startswith("slice_consistency")]
    roughness = measures["roughness"]
    answers.append(_alike(roughness))
    # A distance of 1 may be a small difference: worth saying, no reason to fail.
    answers += [
        "unclear" if _close(b) == "fail" else _close(b) for b in [measures["intensities"], *consistency]
    ]
    words.append(
        "slice consistency (KS) "
        + ", ".join(f"{b.synthetic.value:.2f} ({b.real.value:.2f})" for b in consistency)
    )
    words.append(
        f"change between slices {roughness.synthetic.value:.2f} of scans' ({roughness.real.value:.2f})"
    )
    return Verdict(
        question="Do the samples look like scans?",
        about="use",
        answer=worst(answers),
        found="; ".join(words),
        threshold=f"pass: precision {ENOUGH:.0%} of real scans' or more, Frechet distance and change "
        f"between slices at most {NEAR:g} times theirs, slices and intensities within {CLOSE} of theirs; "
        f"fail: precision below {TOO_LITTLE:.0%}, or Frechet distance above {FAR:g} times, or change "
        f"between slices beyond {ROUGH:g} times or less than 1/{ROUGH:g}",
    )


def diversity_verdict(spaces: Sequence[SpaceReport], similarity: PairSimilarity) -> Verdict:
    """Are the samples as varied as scans?"""
    coverages = [space.distributions["coverage"] for space in spaces]
    pair = similarity.ms_ssim
    answers = [_enough(coverage) for coverage in coverages]
    if pair.synthetic.low > pair.real.high + ALIKE:
        answers.append("fail")
    elif pair.synthetic.low > pair.real.high:
        answers.append("unclear")
    return Verdict(
        question="Are the samples as varied as scans?",
        about="use",
        answer=worst(answers),
        found="; ".join(
            f"by {space.title} coverage {c.synthetic.value:.2f} (real {c.real.value:.2f})"
            for space, c in zip(spaces, coverages, strict=True)
        )
        + f"; MS-SSIM of pairs {pair.synthetic.value:.3f} ({pair.real.value:.3f})",
        threshold=f"pass: coverage {ENOUGH:.0%} of real scans' or more, and pairs no more alike than pairs "
        f"of scans; fail: coverage below {TOO_LITTLE:.0%}, or pairs more alike by {ALIKE}",
    )


def label_verdict(measures: Mapping[str, Beside]) -> Verdict | None:
    """Are the structures as large as real ones? None where there are no label maps to compare."""
    volumes = {name.removeprefix("volume_"): b for name, b in measures.items() if name.startswith("volume_")}
    if not volumes:
        return None
    return Verdict(
        question="Are the labelled structures as large as in scans?",
        about="use",
        answer=worst([_close(beside) for beside in volumes.values()]),
        found="KS distance of volumes: "
        + "; ".join(
            f"{name} {b.synthetic.value:.2f} (real {b.real.value:.2f})" for name, b in volumes.items()
        ),
        threshold=f"pass: at most {CLOSE} above real scans'; fail: more than {APART} above",
    )


def _chance(figure: Figure, most: float) -> Answer:
    """A share that is one half by chance."""
    if figure.low > 0.5:
        return "fail"
    return "pass" if figure.high <= most else "unclear"


def _enough(beside: Beside) -> Answer:
    share = beside.synthetic.value / max(beside.real.value, 1e-9)
    return "pass" if share >= ENOUGH else "fail" if share < TOO_LITTLE else "unclear"


def _near(beside: Beside) -> Answer:
    ratio = beside.synthetic.value / max(beside.real.value, 1e-9)
    return "pass" if ratio <= NEAR else "fail" if ratio > FAR else "unclear"


def _alike(beside: Beside) -> Answer:
    """A ratio that is 1 where there is no difference."""
    ratio = beside.synthetic.value / max(beside.real.value, 1e-9)
    ratio = max(ratio, 1 / max(ratio, 1e-9))
    return "pass" if ratio <= NEAR else "fail" if ratio > ROUGH else "unclear"


def _close(beside: Beside) -> Answer:
    excess = beside.synthetic.value - beside.real.value
    return "pass" if excess <= CLOSE else "fail" if excess > APART else "unclear"


def _percent(figure: Figure) -> str:
    return f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]"
