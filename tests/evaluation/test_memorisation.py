"""Statistics of copies on sets whose answer is known."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from diffaug.errors import DiffaugError
from diffaug.evaluation.memorisation import (
    authenticity,
    copy_threshold,
    correlations,
    count_copies,
    membership_auc,
    memorised_share,
    neighbour_ratios,
)


def test_planted_copies_are_counted_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    training, validation = rng.normal(size=(100, 32)), rng.normal(size=(100, 32))
    synthetic = rng.normal(size=(60, 32))
    synthetic[:7] = training[:7] + 0.05 * rng.normal(size=(7, 32))
    synthetic[7] = training[0]
    tau = copy_threshold(correlations(training, validation))
    similarity = correlations(training, synthetic)
    found = count_copies(similarity, tau)
    assert (found.training, found.synthetic) == (100, 60)
    assert 7 <= found.memorised <= 7 + 12
    assert 8 <= found.copies <= 8 + 12
    assert count_copies(similarity, 0.95)[:2] == (7, 8)


def test_equal_numbers_of_independent_candidates_exceed_tau_as_often_as_it_says() -> None:
    shares = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        training, validation, candidates = (rng.normal(size=(n, 8)) for n in (80, 40, 300))
        tau = copy_threshold(correlations(training, validation))
        similarity = correlations(training, candidates)
        shares.append(memorised_share(similarity, tau, 40, draws=20))
        assert memorised_share(similarity, tau, 300, draws=1) > 2 * shares[-1]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.015)


def test_copies_are_not_authentic_and_a_patients_other_scan_does_not_excuse_them() -> None:
    training = np.array([[0.0], [0.1], [10.0], [20.0]])
    synthetic = np.array([[0.05], [0.3], [15.0], [9.0]])
    to_training, among = abs(synthetic - training.T), abs(training - training.T)
    assert authenticity(to_training, among, "aabc").tolist() == [False, False, False, False]
    assert authenticity(to_training, among, "abcd").tolist() == [False, True, False, False]
    assert authenticity(to_training + 20, among, "aabc").all()


def test_ratio_is_of_patients_not_of_scans() -> None:
    distances = np.array([[1.0, 1.1, 4.0], [3.0, 3.0, 3.0], [0.0, 5.0, 0.0]])
    assert neighbour_ratios(distances, "aab").tolist() == [0.25, 1.0, 1.0]
    assert neighbour_ratios(distances, "abc")[0] == pytest.approx(1 / 1.1)
    with pytest.raises(DiffaugError, match="at least two patients"):
        neighbour_ratios(distances, "aaa")


def test_membership_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(1)
    members, others = rng.uniform(0, 1, size=(50, 20)), rng.uniform(0.02, 1, size=(40, 20))
    found = membership_auc(members, others, range(50), range(40))
    scores = -np.concatenate([members.min(1), others.min(1)])
    assert found.value == pytest.approx(roc_auc_score([1] * 50 + [0] * 40, scores))
    assert found.low < found.value < found.high
    same = membership_auc(members, members, range(50), range(50))
    assert same.value == 0.5
    assert same.low < 0.5 < same.high


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(3, 9)), rng.normal(size=(4, 9))
    assert np.allclose(correlations(a, b), np.corrcoef(a, b)[:3, 3:])
    assert (correlations(np.ones((2, 5)), b[:, :5]) == 0).all()
