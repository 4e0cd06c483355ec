"""Statistics of copies on sets whose answer is known."""

from collections.abc import Sequence

import numpy as np
import pytest

from diffaug.errors import DiffaugError
from diffaug.evaluation.memorisation import (
    CLEAR,
    Search,
    authenticity,
    find_copies,
    membership_auc,
    memorised_share,
    neighbour_ratios,
)


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of rows."""
    return np.corrcoef(first, second)[: len(first), len(first) :]


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


def test_copies_in_another_search_are_found() -> None:
    rng = np.random.default_rng(1)
    first, second = ([rng.normal(size=(n, 16)) for n in (40, 40, 30)] for _ in range(2))
    second[2][5] = second[0][7]
    found = find_copies([search(s, h, t) for t, h, s in (first, second)], range(40))
    assert np.flatnonzero(found.clearly).tolist() == [5]
    assert [np.flatnonzero(one.clearly).tolist() for one in found.searches] == [[], [5]]


@pytest.mark.parametrize("held_out", [14, 40])
def test_strangers_are_suspected_as_often_as_expected_and_rarely_more_than_at_most(held_out: int) -> None:
    shares, expected, beyond = [], set(), 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        sets = [[rng.normal(size=(n, 12)) for n in (50, held_out, 60)] for _ in range(4)]
        found = find_copies([search(s, h, t) for t, h, s in sets], range(held_out)).searches
        shares += [one.suspected.mean() for one in found]
        expected |= {one.expected for one in found}
        beyond += any(one.suspected.mean() > one.most for one in found)
    assert expected == {max(1, held_out // 20) / (held_out + 1)}
    assert np.mean(shares) == pytest.approx(expected.pop(), abs=0.012)
    assert beyond <= 0.1 * 120


def test_the_threshold_is_the_largest_match_of_few_patients_and_the_second_of_forty() -> None:
    held_out = np.linspace(0, 0.8, 40)
    assert find_copies([best_matches([0.5], held_out)], range(40)).searches[0].threshold == held_out[-2]
    assert find_copies([best_matches([0.5], held_out)] * 3, range(40)).searches[1].threshold == held_out[-2]
    assert find_copies([best_matches([0.5], held_out[-9:])], range(9)).searches[0].threshold == 0.8


def test_two_scans_of_a_patient_count_as_the_more_alike() -> None:
    one = find_copies([best_matches([0.5], [0.2, 0.9, 0.3])], "abb").searches[0]
    assert (one.threshold, one.expected) == (0.9, 1 / 3)


def test_a_search_that_is_not_decisive_suspects_alone() -> None:
    pair = best_matches([0.99, 0.1], [0.2, 0.3, 0.4])
    found = find_copies([pair, pair._replace(decisive=False)], "abc")
    assert [one.suspected.tolist() for one in found.searches] == [[True, False]] * 2
    assert [one.clearly.tolist() for one in found.searches] == [[True, False], [False, False]]
    assert found.searches[1].clear is None


def test_what_chance_explains_is_wider_for_few_patients_and_for_many_searches() -> None:
    def most(patients: int, searches: int) -> float:
        pair = best_matches(np.zeros(1000), np.zeros(patients))
        return find_copies([pair] * searches, range(patients)).searches[0].most

    # The largest of 19 strangers' matches: a share p exceeds it with density 19 (1 - p)^18.
    assert most(19, 1) == pytest.approx(1 - 0.05 ** (1 / 19), abs=0.005)
    assert most(19, 4) == pytest.approx(1 - 0.0125 ** (1 / 19), abs=0.005)
    assert most(39, 1) < most(19, 1) < most(9, 1)


def test_a_clear_copy_is_several_times_as_near_as_any_real_case() -> None:
    clear = 1 - CLEAR * 0.2
    samples = [0.77, 0.81, clear - 1e-6, clear + 1e-6, 1.0]
    found = find_copies([best_matches(samples, [0.1, 0.3, 0.8])], "abc")
    assert CLEAR <= 0.5
    assert found.searches[0].clear == pytest.approx(clear)
    assert found.clearly.tolist() == [False, False, False, True, True]
    assert found.suspected.tolist() == [False, True, True, True, True]


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
