"""Statistics of copies on sets whose answer is known."""

from collections.abc import Sequence

import numpy as np
import pytest

from diffaug.errors import DiffaugError
from diffaug.evaluation.memorisation import (
    Search,
    authenticity,
    correlations,
    find_copies,
    membership_auc,
    memorised_share,
    neighbour_ratios,
    share_interval,
)


def search(synthetic: np.ndarray, held_out: np.ndarray, training: np.ndarray) -> Search:
    """Similarities of features."""
    return Search(correlations(synthetic, training), correlations(held_out, training))


def best_matches(synthetic: Sequence[float], held_out: Sequence[float]) -> Search:
    """A search with these similarities to the nearest training case, the first of two."""
    return Search(*(np.stack([values, np.full(len(values), -1.0)], 1) for values in (synthetic, held_out)))


# -------- copies among the synthetic cases


def test_identical_copies_are_suspected_and_clear() -> None:
    rng = np.random.default_rng(0)
    training, held_out, synthetic = (rng.normal(size=(n, 32)) for n in (100, 60, 50))
    synthetic[[3, 17, 40]] = training[[8, 8, 99]]
    found = find_copies([search(synthetic, held_out, training)], range(60))
    assert np.flatnonzero(found.clearly).tolist() == [3, 17, 40]
    assert found.suspected[[3, 17, 40]].all()
    assert found.share.value == found.suspected.mean()


def test_copies_in_another_search_are_found() -> None:
    rng = np.random.default_rng(1)
    first, second = ([rng.normal(size=(n, 16)) for n in (40, 40, 30)] for _ in range(2))
    second[2][5] = second[0][7]
    found = find_copies([search(s, h, t) for t, h, s in (first, second)], range(40))
    assert np.flatnonzero(found.clearly).tolist() == [5]
    assert [np.flatnonzero(one.clearly).tolist() for one in found.searches] == [[], [5]]


@pytest.mark.parametrize("searches", [1, 4])
def test_strangers_are_suspected_as_often_as_held_out_cases(searches: int) -> None:
    shares, nulls, inside = [], [], 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sets = [[rng.normal(size=(n, 12)) for n in (50, 40, 60)] for _ in range(searches)]
        found = find_copies([search(s, h, t) for t, h, s in sets], range(40))
        shares.append(found.share.value)
        nulls.append(found.null.value)
        inside += found.share.value <= found.null.high
    assert np.mean(nulls) == pytest.approx(np.mean(shares), abs=0.02)
    assert inside >= 54


@pytest.mark.parametrize("searches", [1, 4])
def test_many_held_out_cases_keep_all_searches_together_to_the_allowance(searches: int) -> None:
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sets = [[rng.normal(size=(n, 12)) for n in (50, 400, 200)] for _ in range(searches)]
        shares.append(find_copies([search(s, h, t) for t, h, s in sets], range(400)).share.value)
    assert np.mean(shares) == pytest.approx(0.05, abs=0.02)


def test_several_searches_divide_the_allowance() -> None:
    held_out = np.linspace(0, 0.8, 41)
    one = best_matches([0.5], held_out)
    assert find_copies([one], range(41)).searches[0].threshold == pytest.approx(0.95 * 0.8)
    for found in find_copies([one, one], range(41)).searches:
        assert found.threshold == pytest.approx(0.975 * 0.8)
    assert find_copies([one], range(41), percentile=50).searches[0].threshold == pytest.approx(0.4)


def test_a_clear_copy_is_twice_as_near_as_any_real_case() -> None:
    found = find_copies([best_matches([0.79, 0.81, 0.89, 0.91, 1.0], [0.1, 0.3, 0.8])], "abc")
    assert found.searches[0].clear == pytest.approx(0.9)
    assert found.clearly.tolist() == [False, False, False, True, True]
    # 0.75 is the 95th percentile.
    assert found.suspected.all()


def test_a_real_case_is_compared_with_the_threshold_of_other_patients() -> None:
    pair = best_matches([0.5], [0.2, 0.2, 0.9, 0.9])
    assert find_copies([pair], "abcc", percentile=100).searches[0].real.tolist() == [False, False, True, True]
    assert not find_copies([pair], "abcd", percentile=100).searches[0].real.any()


@pytest.mark.parametrize(
    ("patients", "similarities", "message"),
    [
        ("aaa", np.zeros((3, 4)), "at least two patients"),
        ("abc", np.zeros(3), r"a matrix of all pairs is needed, got the shape \(3,\)"),
        ("abc", np.zeros((3, 0)), r"got the shape \(3, 0\)"),
    ],
)
def test_a_search_needs_matrices_and_two_patients(
    patients: str, similarities: np.ndarray, message: str
) -> None:
    with pytest.raises(DiffaugError, match=message):
        find_copies([Search(similarities, similarities)], patients)


# -------- matches of the training cases


def test_a_training_case_matches_where_its_copy_was_drawn() -> None:
    rng = np.random.default_rng(2)
    training, held_out = rng.normal(size=(40, 64)), rng.normal(size=(20, 64))
    found = memorised_share(
        correlations(training, training), correlations(training, held_out), range(20), splits=300
    )
    # Each of 300 times 10 of 40 copies are drawn; the others match as often as strangers do.
    assert found.cases == 10
    assert found.share == pytest.approx(0.25 + 0.75 * found.null, abs=0.03)


def test_strangers_match_as_often_as_held_out_cases_however_many_there_are() -> None:
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        training, held_out, synthetic = (rng.normal(size=(n, 8)) for n in (80, 40, 300))
        found.append(
            memorised_share(
                correlations(training, synthetic), correlations(training, held_out), range(40), splits=20
            )
        )
    assert np.mean([f.null for f in found]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([f.share for f in found]) == pytest.approx(0.05, abs=0.015)


def test_halves_are_of_patients() -> None:
    held_out = np.repeat([[0.9, 0.1]], 5, axis=1).repeat(4, axis=0)
    # Either patient gives tau, and the other one exceeds it in one case of two.
    by_patient = memorised_share(np.zeros((4, 8)), held_out, "aaaaabbbbb", splits=400)
    assert by_patient.null == pytest.approx(0.5, abs=0.08)
    assert by_patient.threshold == pytest.approx(0.5, abs=0.07)
    by_scan = memorised_share(np.zeros((4, 8)), held_out, range(10), splits=400)
    assert by_scan.cases == 5
    assert by_scan.null < 0.02


def test_matches_need_two_held_out_patients_and_matrices() -> None:
    with pytest.raises(DiffaugError, match="at least two patients"):
        memorised_share(np.zeros((4, 5)), np.zeros((4, 2)), "aa")
    with pytest.raises(DiffaugError, match="a matrix of all pairs"):
        memorised_share(np.zeros(4), np.zeros((4, 2)), "ab")


# -------- intervals of shares


@pytest.mark.parametrize(
    ("hits", "cases", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_one_case_per_patient_has_wilsons_interval(hits: int, cases: int, low: float, high: float) -> None:
    # Newcombe, Stat Med 17 (1998) 857, Table I, method 3.
    found = share_interval(np.arange(cases) < hits, range(cases))
    assert found.value == pytest.approx(hits / cases)
    assert found.low == pytest.approx(low, abs=5e-4)
    assert found.high == pytest.approx(high, abs=5e-4)


def test_copies_within_a_patient_count_once() -> None:
    found = np.random.default_rng(4).uniform(size=60) < 0.2
    single = share_interval(found, range(60))
    assert share_interval(np.repeat(found, 3), np.repeat(np.arange(60), 3).tolist()) == pytest.approx(single)
    independent = share_interval(np.repeat(found, 3), range(180))
    assert independent.high - independent.low < 0.65 * (single.high - single.low)


def test_shares_are_covered_as_often_as_the_interval_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        people = rng.uniform(size=50) < 0.15
        interval = share_interval(np.repeat(people, 2), np.repeat(np.arange(50), 2).tolist(), level=0.9)
        covered += interval.low <= 0.15 <= interval.high
    assert 0.84 <= covered / 300 <= 0.97


# -------- distances


def test_copies_are_not_authentic_and_a_patients_other_scan_does_not_excuse_them() -> None:
    training = np.array([[0.0], [0.1], [10.0], [20.0]])
    synthetic = np.array([[0.05], [0.3], [15.0], [9.0]])
    to_training, among = abs(synthetic - training.T), abs(training - training.T)
    assert authenticity(to_training, among, "aabc").tolist() == [False, False, False, False]
    assert authenticity(to_training, among, "abcd").tolist() == [False, True, False, False]
    assert authenticity(to_training + 20, among, "aabc").all()
    with pytest.raises(DiffaugError, match="at least two patients"):
        authenticity(to_training, among, "aaaa")


def test_ratio_is_of_patients_not_of_scans() -> None:
    distances = np.array([[1.0, 1.1, 4.0], [3.0, 3.0, 3.0], [0.0, 5.0, 0.0]])
    assert neighbour_ratios(distances, "aab").tolist() == [0.25, 1.0, 1.0]
    assert neighbour_ratios(distances, "abc")[0] == pytest.approx(1 / 1.1)
    with pytest.raises(DiffaugError, match="at least two patients"):
        neighbour_ratios(distances, "aaa")


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(3, 9)), rng.normal(size=(4, 9))
    assert np.allclose(correlations(a, b), np.corrcoef(a, b)[:3, 3:])
    assert (correlations(np.ones((2, 5)), b[:, :5]) == 0).all()


# -------- membership


def test_membership_is_the_share_of_pairs_in_which_the_member_is_nearer() -> None:
    rng = np.random.default_rng(1)
    members = rng.uniform(0, 1, size=(50, 20)).round(2)
    others = rng.uniform(0.02, 1, size=(40, 20)).round(2)
    near, far = members.min(1)[:, None], others.min(1)[None, :]
    found = membership_auc(members, others, range(50), range(40))
    assert found.value == pytest.approx(((near < far) + 0.5 * (near == far)).mean())
    assert found.low < found.value < found.high


def test_guessing_is_a_half_and_certainty_one() -> None:
    distances = np.random.default_rng(2).uniform(1, 2, size=(30, 10))
    same = membership_auc(distances, distances, range(30), range(30))
    assert same.value == 0.5
    assert same.low < 0.5 < same.high
    certain = membership_auc(distances - 1, distances + 1, range(30), range(30))
    assert tuple(certain) == (1.0, 1.0, 1.0)
    assert tuple(membership_auc(distances + 1, distances - 1, range(30), range(30))) == (0.0, 0.0, 0.0)


def test_membership_draws_patients_by_its_seed() -> None:
    rng = np.random.default_rng(3)
    members, others = np.repeat(rng.uniform(size=(20, 9)), 4, 0), np.repeat(rng.uniform(size=(20, 9)), 4, 0)
    patients, scans = np.repeat(np.arange(20), 4).tolist(), range(80)
    by_patient = membership_auc(members, others, patients, patients)
    by_scan = membership_auc(members, others, scans, scans)
    assert by_patient.value == by_scan.value
    assert by_patient.high - by_patient.low > 1.6 * (by_scan.high - by_scan.low)
    assert membership_auc(members, others, patients, patients) == by_patient
    assert membership_auc(members, others, patients, patients, seed=1) != by_patient
