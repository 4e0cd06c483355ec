"""Fidelity and diversity: samples and training cases, each compared with held-out ones."""

import dataclasses

import numpy as np
import pytest

from diffaug.audit.fidelity import Comparison, compare_features, compare_measures, compare_pairs
from diffaug.audit.record import Beside, Figure
from diffaug.audit.volumes import CaseSet, Sets
from diffaug.progress import Progress
from tests.audit.world import case_set, standard_sets

QUIET = Progress(quiet=True)


def empty_sets(synthetic: int, training: int, held_out: int) -> Sets:
    """Sets whose features are told by themselves."""
    names = (("synthetic", synthetic), ("training", training), ("held_out", held_out))
    return Sets(*(case_set(name, np.zeros((count, 2, 2, 2))) for name, count in names))


def of_features(*features: np.ndarray) -> dict[str, Comparison]:
    return compare_features(*features, sets=empty_sets(*map(len, features)))


# -------- features


def test_samples_of_the_scans_distribution_are_as_good_as_scans() -> None:
    rng = np.random.default_rng(0)
    found = of_features(*(rng.normal(size=(n, 3)) for n in (100, 100, 100)))
    assert set(found) == {"frechet_distance", "mmd", "precision", "recall", "density", "coverage"}
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name].synthetic.value == pytest.approx(found[name].real.value, abs=0.12)
        assert found[name].synthetic.value > 0.75
    for side in found["mmd"]:
        assert side.low < 0 < side.high or abs(side.value) < 0.01


@pytest.mark.parametrize(("cases", "dimensions"), [(60, 400), (144, 64)])
def test_scans_are_no_farther_from_each_other_than_honest_samples_in_many_dimensions(
    cases: int, dimensions: int
) -> None:
    """Components that are fitted to the training cases fit these better than any others."""
    ratios, precisions = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        found = of_features(*(rng.normal(size=(cases, dimensions)) for _ in range(3)))
        ratios.append(found["frechet_distance"].real.value / found["frechet_distance"].synthetic.value)
        precisions.append(found["precision"].real.value - found["precision"].synthetic.value)
    assert np.mean(ratios) == pytest.approx(1, abs=0.35)
    assert np.mean(precisions) == pytest.approx(0, abs=0.15)


def test_shifted_and_collapsed_samples_are_worse_than_scans() -> None:
    rng = np.random.default_rng(1)
    training, held_out = rng.normal(size=(80, 3)), rng.normal(size=(60, 3))
    shifted = of_features(rng.normal((4, 0, 0), 1, (70, 3)), training, held_out)
    assert shifted["frechet_distance"].synthetic.low > shifted["frechet_distance"].real.high
    assert shifted["frechet_distance"].synthetic.value > 8
    assert shifted["precision"].synthetic.value < 0.8 * shifted["precision"].real.value
    assert shifted["coverage"].synthetic.high < 0.2
    collapsed = of_features(0.05 * rng.normal(size=(70, 3)), training, held_out)
    assert collapsed["precision"].synthetic.value > 0.9
    assert collapsed["coverage"].synthetic.high < 0.5 * collapsed["coverage"].real.value


def test_figures_do_not_depend_on_units_or_on_the_number_of_samples() -> None:
    rng = np.random.default_rng(2)
    features = [rng.normal(size=(n, 3)) for n in (400, 60, 60)]
    found = of_features(*features)
    other = of_features(*(100 * f + 7 for f in features))
    for name, comparison in found.items():
        assert np.allclose(comparison, other[name], rtol=1e-6, atol=1e-9)
    few = of_features(features[0][:60], *features[1:])["frechet_distance"]
    assert few.synthetic.value == pytest.approx(found["frechet_distance"].synthetic.value, abs=0.15)


def test_draws_are_by_patient_and_by_their_seed() -> None:
    rng = np.random.default_rng(3)
    people = rng.normal(size=(16, 3))
    scans = np.repeat(people, 4, axis=0) + 0.05 * rng.normal(size=(64, 3))
    features = rng.normal(size=(64, 3)), scans, rng.normal(size=(64, 3))
    sets = empty_sets(64, 64, 64)
    patients = tuple(f"P{number // 4}" for number in range(64))
    known = sets._replace(training=dataclasses.replace(sets.training, patients=patients))
    by_patient, by_scan = (compare_features(*features, s)["frechet_distance"] for s in (known, sets))
    assert by_patient.real.high - by_patient.real.low > 1.3 * (by_scan.real.high - by_scan.real.low)
    assert compare_features(*features, known)["frechet_distance"] == by_patient
    assert compare_features(*features, known, seed=1)["frechet_distance"] != by_patient


# -------- measures


def measured(cases: CaseSet, **changes: object) -> CaseSet:
    return dataclasses.replace(cases, **changes)  # type: ignore[arg-type]


def test_measures_of_equal_and_of_different_distributions() -> None:
    sets = empty_sets(30, 30, 30)
    rng = np.random.default_rng(4)
    levels = np.linspace(-2, 2, 33)
    consistency = rng.uniform(0.7, 0.9, (30, 3))
    volumes = {"core": np.arange(30.0)}
    real = {"intensities": np.tile(levels, (30, 1, 1)), "label_volumes": volumes}
    sets = Sets(
        measured(
            sets.synthetic,
            intensities=real["intensities"] + 0.25,
            # Twice the change between slices.
            consistency=1 - 2 * (1 - consistency),
            label_volumes={"core": volumes["core"] + 1000},
        ),
        *(measured(s, **real, consistency=consistency) for s in sets[1:]),
    )
    found = compare_measures(sets, ["core"])
    assert list(found) == [
        "intensities",
        "roughness",
        "slice_consistency_i",
        "slice_consistency_j",
        "slice_consistency_k",
        "volume_core",
    ]
    assert found["intensities"].synthetic.value == pytest.approx(0.25)
    assert found["intensities"].real.value == pytest.approx(0)
    assert found["roughness"].synthetic.value == pytest.approx(2)
    assert found["roughness"].real.value == pytest.approx(1)
    assert tuple(found["volume_core"].synthetic) == (1, 1, 1)
    assert found["volume_core"].real.value == 0
    assert found["slice_consistency_i"].synthetic.value > 0.5
    assert found["slice_consistency_i"].real.value == 0


def test_figures_of_few_labelled_cases_read_back() -> None:
    sets = empty_sets(16, 20, 20)
    volumes = np.full(20, np.nan)
    volumes[:2] = 7.0
    sets = Sets(
        measured(sets.synthetic, label_volumes={"core": np.arange(16.0)}),
        measured(sets.training, label_volumes={"core": np.arange(20.0)}),
        measured(sets.held_out, label_volumes={"core": volumes}),
    )
    found = compare_measures(sets, ["core"])["volume_core"]
    beside = Beside(synthetic=Figure.of(found.synthetic), real=Figure.of(found.real))
    assert Beside.model_validate_json(beside.model_dump_json())


# -------- pairs


def test_copies_of_one_case_are_fully_alike() -> None:
    sets = standard_sets()
    copies = case_set("copy", np.repeat(sets.training.images[:1], 18, axis=0))
    found = compare_pairs(sets._replace(synthetic=copies), QUIET)
    assert tuple(found.synthetic) == pytest.approx((1, 1, 1))
    assert found.real.high < 0.7
    assert found.real.low < found.real.value < found.real.high
    # 18 samples make 9 pairs, so do as many of the 20 training cases.
    assert (found.pairs, found.scales, found.kernel) == (9, 1, 7)


def test_a_pair_shows_two_patients() -> None:
    sets = standard_sets(training=10)
    images = np.repeat(sets.training.images, 2, axis=0)
    twice = case_set("training", images, [f"P{number // 2}" for number in range(20)])
    found = compare_pairs(sets._replace(training=twice), QUIET)
    assert found.pairs == 5
    assert found.real.high < 0.9


@pytest.mark.parametrize(
    ("side", "scales", "kernel"), [(8, 1, 7), (16, 2, 7), (24, 2, 7), (32, 3, 7), (40, 3, 7)]
)
def test_scales_are_as_many_as_the_grid_allows(side: int, scales: int, kernel: int) -> None:
    rng = np.random.default_rng(5)
    sets = Sets(*(case_set(name, rng.normal(size=(4, side, side, side))) for name in ("s", "t", "h")))
    found = compare_pairs(sets, QUIET)
    assert (found.scales, found.kernel) == (scales, kernel)
