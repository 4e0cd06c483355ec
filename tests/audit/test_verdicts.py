"""Verdicts at their thresholds."""

import pytest

from diffaug.audit.record import (
    Answer,
    Beside,
    CopyRecord,
    Figure,
    Memorisation,
    PairSimilarity,
    SearchRecord,
    SpaceReport,
    Verdict,
)
from diffaug.audit.verdicts import (
    balance_verdict,
    copy_verdict,
    diversity_verdict,
    fidelity_verdict,
    label_verdict,
    membership_verdict,
)

Three = tuple[float, float, float]
CHANCE = (0.5, 0.45, 0.55)


def figure(value: float | Three) -> Figure:
    value, low, high = value if isinstance(value, tuple) else (value, value, value)
    return Figure(value=value, low=low, high=high)


def beside(synthetic: float | Three, real: float | Three) -> Beside:
    return Beside(synthetic=figure(synthetic), real=figure(real))


def memorisation(balance: Three = CHANCE, auc: Three = CHANCE) -> Memorisation:
    return Memorisation(
        tau=0.7,
        memorised_share=0.05,
        memorised_null=0.05,
        matched=20,
        balance=figure(balance),
        balance_cases=40,
        balance_of_copies=0.8,
        authentic_share=0.8,
        authentic_null=0.8,
        neighbour_ratio=0.9,
        neighbour_ratio_null=0.9,
        membership_auc=figure(auc),
    )


def space(precision: float = 0.9, distance: float = 1.0, coverage: float = 0.9) -> SpaceReport:
    """A space where real cases have 0.9, 1 and 0.9."""
    return SpaceReport(
        name="encoder",
        title="contrastive encoder",
        memorisation=memorisation(),
        distributions={
            "precision": beside(precision, 0.9),
            "frechet_distance": beside(distance, 1.0),
            "coverage": beside(coverage, 0.9),
        },
    )


def measures(roughness: float = 1.0, intensities: float = 0.0, consistency: float = 0.0) -> dict[str, Beside]:
    """What real cases have as 1, 0.1 and 0.2, and samples more by the amounts given."""
    return {
        "roughness": beside(roughness, 1.0),
        "intensities": beside(0.1 + intensities, 0.1),
        "slice_consistency_i": beside(0.2, 0.2),
        "slice_consistency_j": beside(0.2 + consistency, 0.2),
        "slice_consistency_k": beside(0.2, 0.2),
    }


def similarity(synthetic: Three = (0.5, 0.45, 0.55), real: Three = (0.5, 0.45, 0.55)) -> PairSimilarity:
    return PairSimilarity(ms_ssim=beside(synthetic, real), scales=3, kernel=7, pairs=60)


# -------- copies


def searches(copies: int, most: float) -> list[SearchRecord]:
    """Two searches, of which the second finds some."""
    return [
        SearchRecord(
            name=name,
            title=name,
            threshold=0.8,
            clear_threshold=0.9,
            copies=count,
            clear_copies=0,
            expected=0.05,
            most=most,
        )
        for name, count in (("one", 0), ("two", copies))
    ]


@pytest.mark.parametrize(
    ("clear", "copies", "most", "answer"),
    [
        (0, 0, 0.1, "pass"),
        (0, 6, 0.1, "pass"),
        (0, 7, 0.1, "fail"),
        (1, 1, 0.1, "fail"),
        (0, 6, 0.3, "unclear"),
        (0, 19, 0.3, "fail"),
    ],
)
def test_copies(clear: int, copies: int, most: float, answer: Answer) -> None:
    record = CopyRecord(
        copies=copies,
        clear_copies=clear,
        training_cases=copies,
        training_patients=copies,
        searches=searches(copies, most),
    )
    verdict = copy_verdict(record, 60)
    assert verdict.answer == answer
    assert f"{clear} clear copies; {copies} of 60 samples" in verdict.found
    assert f"{copies} by two (an honest generator: up to {60 * most:.0f})" in verdict.found


def test_a_balance_that_copies_could_hardly_move_is_unclear() -> None:
    found = memorisation(balance=(0.5, 0.44, 0.56)).model_copy(update={"balance_of_copies": 0.57})
    verdict = balance_verdict([("raw intensities", found)])
    assert verdict.answer == "unclear"
    assert "nothing but copies would give 57%" in verdict.found


# -------- balance and membership


@pytest.mark.parametrize(
    ("interval", "answer"),
    [
        ((0.55, 0.50, 0.60), "pass"),
        ((0.55, 0.50, 0.61), "unclear"),
        ((0.48, 0.20, 0.80), "unclear"),
        ((0.55, 0.51, 0.59), "fail"),
        ((0.90, 0.85, 0.95), "fail"),
    ],
)
def test_balance_and_membership(interval: Three, answer: Answer) -> None:
    fine = ("raw intensities", memorisation())
    verdict = balance_verdict([fine, ("contrastive encoder", memorisation(balance=interval))])
    assert verdict.answer == answer
    assert "50.0% [45.0%, 55.0%] by raw intensities" in verdict.found
    assert "of 40 on each side" in verdict.found
    verdict = membership_verdict([("contrastive encoder", memorisation(auc=interval)), fine])
    assert verdict.answer == answer
    assert "0.5 [0.45, 0.55] by raw intensities" in verdict.found


@pytest.mark.parametrize("interval", [(0.2, 0.16, 0.24), (0.45, 0.42, 0.499)])
def test_below_one_half_nothing_passes(interval: Three) -> None:
    """Who can tell by nearness can tell by distance."""
    assert balance_verdict([("encoder", memorisation(balance=interval))]).answer == "unclear"
    assert membership_verdict([("encoder", memorisation(auc=interval))]).answer == "fail"


# -------- fidelity


@pytest.mark.parametrize(
    ("worse", "answer"),
    [
        (space(), "pass"),
        (space(precision=0.9), "pass"),
        (space(precision=0.721), "pass"),
        (space(precision=0.719), "unclear"),
        (space(precision=0.451), "unclear"),
        (space(precision=0.449), "fail"),
        (space(distance=0.0), "pass"),
        (space(distance=2.0), "pass"),
        (space(distance=2.01), "unclear"),
        (space(distance=10.0), "unclear"),
        (space(distance=10.1), "fail"),
        # Diversity is another question.
        (space(coverage=0.0), "pass"),
    ],
)
def test_fidelity_of_features(worse: SpaceReport, answer: Answer) -> None:
    assert fidelity_verdict([space(), worse], measures()).answer == answer
    assert fidelity_verdict([worse, space()], measures()).answer == answer


@pytest.mark.parametrize(
    ("worse", "answer"),
    [
        (measures(roughness=2.0), "pass"),
        (measures(roughness=0.5), "pass"),
        (measures(roughness=2.01), "unclear"),
        (measures(roughness=0.49), "unclear"),
        (measures(roughness=4.0), "unclear"),
        (measures(roughness=4.01), "fail"),
        (measures(roughness=0.249), "fail"),
        (measures(roughness=0.0), "fail"),
        (measures(intensities=0.149), "pass"),
        (measures(intensities=0.151), "unclear"),
        (measures(consistency=0.149), "pass"),
        (measures(consistency=0.151), "unclear"),
        # The largest distance that there is may be a small difference.
        (measures(consistency=0.8), "unclear"),
        (measures(intensities=5.0), "unclear"),
        (measures(consistency=-0.2), "pass"),
    ],
)
def test_fidelity_of_measures(worse: dict[str, Beside], answer: Answer) -> None:
    assert fidelity_verdict([space()], worse).answer == answer


# -------- diversity


@pytest.mark.parametrize(
    ("coverage", "pairs", "answer"),
    [
        (0.9, similarity(), "pass"),
        (0.721, similarity(), "pass"),
        (0.719, similarity(), "unclear"),
        (0.451, similarity(), "unclear"),
        (0.449, similarity(), "fail"),
        (0.9, similarity((0.6, 0.55, 0.65)), "pass"),
        (0.9, similarity((0.6, 0.56, 0.65)), "unclear"),
        (0.9, similarity((0.6, 0.599, 0.65)), "unclear"),
        (0.9, similarity((0.7, 0.601, 0.75)), "fail"),
        (0.9, similarity((0.1, 0.0, 0.2)), "pass"),
    ],
)
def test_diversity(coverage: float, pairs: PairSimilarity, answer: Answer) -> None:
    verdict = diversity_verdict([space(), space(coverage=coverage)], pairs)
    assert verdict.answer == answer
    assert f"coverage {coverage:.2f} (real 0.90)" in verdict.found


# -------- labels


@pytest.mark.parametrize(
    ("excess", "answer"),
    [(-0.1, "pass"), (0.149, "pass"), (0.151, "unclear"), (0.399, "unclear"), (0.401, "fail")],
)
def test_labels(excess: float, answer: Answer) -> None:
    volumes = {"volume_head": beside(0.2, 0.2), "volume_tail": beside(0.2 + excess, 0.2)}
    verdict = label_verdict(measures() | volumes)
    assert verdict is not None
    assert verdict.answer == answer
    assert "head 0.20 (real 0.20); tail" in verdict.found


def test_without_label_maps_there_is_no_verdict_on_labels() -> None:
    assert label_verdict(measures()) is None


def test_every_verdict_states_its_threshold() -> None:
    found: list[Verdict | None] = [
        copy_verdict(
            CopyRecord(
                copies=0, clear_copies=0, training_cases=0, training_patients=0, searches=searches(0, 0.1)
            ),
            samples=20,
        ),
        balance_verdict([("encoder", memorisation())]),
        membership_verdict([("encoder", memorisation())]),
        fidelity_verdict([space()], measures()),
        diversity_verdict([space()], similarity()),
        label_verdict({"volume_head": beside(0.2, 0.2)}),
    ]
    for verdict in found:
        assert verdict is not None
        assert verdict.answer == "pass"
        assert verdict.question.endswith("?")
        assert "pass:" in verdict.threshold
        assert "fail:" in verdict.threshold
