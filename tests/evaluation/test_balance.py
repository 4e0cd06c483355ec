"""The balance test on sets whose balance is known."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from diffaug.errors import DiffaugError
from diffaug.evaluation.balance import Balance, balance


def of_points(
    queries: np.ndarray,
    training: np.ndarray,
    held_out: np.ndarray,
    training_patients: Sequence[int] | None = None,
    held_out_patients: Sequence[int] | None = None,
    *,
    exchanges: int = 40,
    seed: int = 0,
) -> Balance:
    """The balance by Euclidean distances; each point is a patient by default."""
    return balance(
        cdist(queries, training),
        cdist(queries, held_out),
        range(len(training)) if training_patients is None else training_patients,
        range(len(held_out)) if held_out_patients is None else held_out_patients,
        exchanges=exchanges,
        seed=seed,
    )


def test_the_interval_covers_a_half_for_strangers_as_often_as_it_says() -> None:
    covered, shares = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        queries, training, held_out = (rng.normal(size=(n, 6)) for n in (60, 40, 20))
        share = of_points(queries, training, held_out, exchanges=80, seed=seed).share
        covered += share.low <= 0.5 <= share.high
        shares.append(share.value)
    assert 0.85 <= covered / 40 <= 1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("training", "held_out"), [(60, 20), (40, 40), (20, 30)])
def test_copies_lean_by_the_share_of_originals_in_a_subset(training: int, held_out: int) -> None:
    shares = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        members, others = rng.normal(size=(training, 16)), rng.normal(size=(held_out, 16))
        copies = members[rng.integers(training, size=300)]
        shares.append(of_points(copies, members, others, exchanges=2).share.value)
    kept = min(training, held_out) / training
    assert np.mean(shares) == pytest.approx(0.5 + kept / 2, abs=0.03)


def test_copies_exclude_a_half_from_the_interval() -> None:
    rng = np.random.default_rng(0)
    training, held_out = rng.normal(size=(60, 16)), rng.normal(size=(30, 16))
    copies = training[rng.integers(60, size=100)] + 0.1 * rng.normal(size=(100, 16))
    share = of_points(copies, training, held_out, exchanges=100).share
    assert 0.5 < share.low < share.value < share.high <= 1


def test_swapped_sides_give_the_rest() -> None:
    rng = np.random.default_rng(1)
    queries, first, second = rng.normal(size=(80, 4)), rng.normal(size=(25, 4)), rng.normal(0.3, 1, (25, 4))
    here, there = of_points(queries, first, second), of_points(queries, second, first)
    assert here.share.value + there.share.value == pytest.approx(1)
    few, many = of_points(queries, first[:9], second), of_points(queries, second, first[:9])
    assert few.share.value + many.share.value == pytest.approx(1, abs=0.03)
    assert few.share.low + many.share.high == pytest.approx(1, abs=0.12)


def test_ties_are_a_half_with_no_width() -> None:
    found = balance(np.ones((5, 8)), np.ones((5, 6)), range(8), range(6), exchanges=9)
    assert tuple(found.share) == (0.5, 0.5, 0.5)


def test_both_sides_have_as_many_patients_and_as_many_cases() -> None:
    rng = np.random.default_rng(2)
    queries, training, held_out = (rng.normal(size=(n, 4)) for n in (30, 30, 20))
    twice = np.repeat(np.arange(10), 2).tolist()
    assert of_points(queries, training, held_out).cases == 20
    # Ten patients on each side are ten cases here and twenty there.
    assert of_points(queries, training, held_out, held_out_patients=twice).cases == 10
    assert of_points(queries, training[:20], held_out, twice, twice).cases == 20


def test_a_patients_scans_are_no_further_patients() -> None:
    widths = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        queries, training, held_out = (rng.normal(size=(n, 3)) for n in (200, 20, 20))
        training, held_out = np.repeat(training, 3, axis=0), np.repeat(held_out, 3, axis=0)
        patients = np.repeat(np.arange(20), 3).tolist()
        found = [
            of_points(queries, training, held_out, patients, patients, exchanges=60),
            of_points(queries, training, held_out, exchanges=60),
        ]
        widths.append([one.share.high - one.share.low for one in found])
    by_patient, by_scan = np.mean(widths, axis=0)
    assert by_patient > 1.2 * by_scan


def test_the_numbers_depend_on_the_seed_alone() -> None:
    rng = np.random.default_rng(3)
    points = [rng.normal(size=(n, 4)) for n in (40, 30, 12)]
    assert of_points(*points, seed=5) == of_points(*points, seed=5)
    assert of_points(*points, seed=5) != of_points(*points, seed=6)


@pytest.mark.parametrize("level", [0.5, 0.8])
def test_lower_confidence_is_a_narrower_interval(level: float) -> None:
    rng = np.random.default_rng(4)
    queries, training, held_out = (rng.normal(size=(n, 4)) for n in (40, 20, 20))
    distances = cdist(queries, training), cdist(queries, held_out), range(20), range(20)
    narrow = balance(*distances, level=level, exchanges=60).share
    wide = balance(*distances, exchanges=60).share
    assert narrow.value == wide.value
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("training", "held_out", "message"),
    [
        ("aabbcc", "abcd", "3 training and 4 held-out patients: .* at least four of each"),
        ("abcdef", "aabb", "6 training and 2 held-out patients"),
        ("abcde", "abcd", r"distances \(7, 6\) do not fit 5 patients"),
        ("abcdef", "abcde", r"distances \(7, 4\) do not fit 5 patients"),
    ],
)
def test_too_few_patients_and_shapes_that_do_not_fit_are_refused(
    training: str, held_out: str, message: str
) -> None:
    with pytest.raises(DiffaugError, match=message):
        balance(np.zeros((7, 6)), np.zeros((7, 4)), training, held_out)


@pytest.mark.parametrize(("first", "second"), [(7, 5), (5, 7)])
def test_distances_are_of_the_same_queries(first: int, second: int) -> None:
    with pytest.raises(DiffaugError):
        balance(np.zeros((first, 6)), np.zeros((second, 4)), range(6), range(4), exchanges=2)


def test_distances_are_a_matrix() -> None:
    with pytest.raises(DiffaugError, match="do not fit 6 patients"):
        balance(np.zeros(6), np.zeros((7, 4)), range(6), range(4))


def test_the_interval_is_as_wide_as_the_share_varies() -> None:
    shares, widths = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        queries, training, held_out = (rng.normal(size=(n, 6)) for n in (100, 46, 20))
        share = of_points(queries, training, held_out, exchanges=60, seed=seed).share
        shares.append(share.value)
        widths.append((share.high - share.low) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(np.std(shares, ddof=1), rel=0.3)
