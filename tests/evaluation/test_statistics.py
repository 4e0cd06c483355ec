"""Statistics against closed forms and simulations."""

import numpy as np
import pytest

from diffaug.errors import DiffaugError
from diffaug.evaluation.statistics import (
    around,
    gap_interval,
    half,
    hierarchical_interval,
    holm,
    ks_null,
    ks_statistic,
    mean_interval,
    nearer_share,
    nearer_share_interval,
    ratio_interval,
    signed_rank,
)


def test_mean_interval_has_the_width_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = mean_interval(values, range(400))
    half_width = 1.96 * values.std(ddof=1) / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)
    assert interval.low < values.mean() < interval.high


def test_mean_interval_counts_copies_within_a_cluster_once() -> None:
    values = np.random.default_rng(1).normal(size=60)
    single = mean_interval(values, range(60))
    doubled = mean_interval(np.repeat(values, 2), np.repeat(np.arange(60), 2).tolist())
    assert doubled.value == pytest.approx(single.value)
    assert doubled.high - doubled.low == pytest.approx(single.high - single.low, rel=1e-6)


def test_mean_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(40), 2).tolist()
    covered = 0
    for seed in range(150):
        values = np.repeat(rng.normal(size=40), 2) + 0.3 * rng.normal(size=80)
        interval = mean_interval(values, clusters, level=0.9, resamples=400, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 0.82 <= covered / 150 <= 0.97


def test_ratio_interval_is_a_ratio_of_sums_and_narrow_for_proportional_pairs() -> None:
    rng = np.random.default_rng(3)
    bottom = rng.uniform(0.5, 1.0, 50)
    top = 0.9 * bottom + rng.normal(0, 1e-3, 50)
    interval = ratio_interval(top, bottom, range(50))
    assert interval.value == pytest.approx(top.sum() / bottom.sum())
    assert interval.high - interval.low < 2e-3


def test_ratio_of_equal_values_has_no_width() -> None:
    values = np.random.default_rng(4).uniform(size=10)
    assert tuple(ratio_interval(values, values, range(10))) == (1.0, 1.0, 1.0)


def test_intervals_depend_on_their_seed_alone() -> None:
    values = np.random.default_rng(5).normal(size=30)
    assert mean_interval(values, range(30), seed=1) == mean_interval(values, range(30), seed=1)
    assert mean_interval(values, range(30), seed=1) != mean_interval(values, range(30), seed=2)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [([1.0, 2.0], ["a", "a"], "at least two"), ([1.0, 2.0, 3.0], ["a", "b"], "one each")],
)
def test_intervals_refuse_what_they_cannot_measure(
    values: list[float], clusters: list[str], message: str
) -> None:
    with pytest.raises(DiffaugError, match=message):
        mean_interval(values, clusters)


def test_ks_statistic_of_known_samples() -> None:
    assert ks_statistic([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert ks_statistic([1, 2], [3, 4]) == 1
    assert ks_statistic([1, 2, 3, 4], [2.5, 3.5, 4.5, 5.5]) == pytest.approx(0.5)


def test_ks_null_agrees_with_independent_draws_and_widens_with_clusters() -> None:
    rng = np.random.default_rng(6)
    people = rng.normal(size=100)
    values = np.repeat(people, 2)
    null = ks_null(values, np.repeat(np.arange(100), 2).tolist(), 500, resamples=400)
    simulated = [ks_statistic(np.repeat(rng.normal(size=100), 2), rng.normal(size=500)) for _ in range(400)]
    assert null.value == pytest.approx(np.median(simulated), rel=0.12)
    assert null.high == pytest.approx(np.quantile(simulated, 0.975), rel=0.15)
    independent = ks_null(values, range(200), 500, resamples=400)
    assert independent.value < 0.9 * null.value
    assert ks_statistic(values, rng.normal(1.0, 1.0, 500)) > null.high


def test_nearer_share_counts_nearest_neighbours_and_halves_ties() -> None:
    to_first = np.array([[1.0, 9.0], [5.0, 6.0], [2.0, 3.0], [4.0, 4.0]])
    to_second = np.array([[2.0, 9.0], [4.0, 9.0], [2.0, 9.0], [9.0, 5.0]])
    assert nearer_share(to_first, to_second) == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_nearer_share_interval_holds_a_half_for_strangers_and_not_for_copies() -> None:
    rng = np.random.default_rng(7)
    first, second, queries = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)), rng.normal(size=(300, 5))

    def distances(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - targets[None], axis=2)

    strangers = nearer_share_interval(
        distances(queries, first), distances(queries, second), range(40), range(40), resamples=300
    )
    assert strangers.low < 0.5 < strangers.high
    copies = first[rng.integers(40, size=300)] + 0.05 * rng.normal(size=(300, 5))
    memorised = nearer_share_interval(
        distances(copies, first), distances(copies, second), range(40), range(40), resamples=300
    )
    assert memorised.value > 0.95
    assert memorised.low > 0.5


def test_halves_are_drawn_without_repeats_and_rounded_down() -> None:
    rng = np.random.default_rng(8)
    items = np.array([2, 3, 5, 7, 11, 13, 17])
    drawn = [half(items, rng) for _ in range(300)]
    assert {len(one) for one in drawn} == {3}
    assert all(len(set(one.tolist())) == 3 and set(one.tolist()) <= set(items.tolist()) for one in drawn)
    assert np.unique(drawn, return_counts=True)[1] / 300 == pytest.approx(np.full(7, 3 / 7), abs=0.1)


def test_means_of_halves_spread_as_the_mean_does() -> None:
    rng = np.random.default_rng(9)
    values = rng.normal(size=100)
    means = [values[half(np.arange(100), rng)].mean() for _ in range(4000)]
    assert np.std(means) == pytest.approx(values.std(ddof=1) / 10, rel=0.05)
    interval = around(values.mean(), means)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 10, rel=0.05)


def test_an_interval_of_halves_lies_around_the_value_not_around_them() -> None:
    # One standard deviation, 2, on each side.
    assert tuple(around(5.0, [100, 102, 104], level=0.6826894921)) == pytest.approx((5.0, 3.0, 7.0))
    assert tuple(around(0.9, [0.5, 0.9, 1.0])) == pytest.approx((0.9, 0.9 - 0.5186, 0.9 + 0.5186), abs=1e-3)
    assert tuple(around(5.0, [7, 7])) == (5.0, 5.0, 5.0)


def test_hierarchical_interval_is_as_wide_as_seeds_and_clusters_make_it() -> None:
    rng = np.random.default_rng(3)
    seeds, patients = 40, 60
    by_seed, by_patient = rng.normal(0, 1, seeds), rng.normal(0, 2, patients)
    values = by_seed[:, None] + by_patient[None, :]
    interval = hierarchical_interval(values, range(patients))
    spread = np.sqrt(by_seed.var() / seeds + by_patient.var() / patients)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize("seeds", [3, 5])
def test_hierarchical_interval_holds_for_few_seeds(seeds: int) -> None:
    """Where there is no difference, it leaves out 0 about once in twenty times."""
    rng = np.random.default_rng(7)
    missed = 0
    for _ in range(200):
        values = rng.normal(0, 0.015, (seeds, 1)) + rng.normal(0, 0.02, (1, 20))
        values = values + rng.normal(0, 0.02, (seeds, 20))
        interval = hierarchical_interval(values, range(20), resamples=500)
        missed += not interval.low < 0 < interval.high
    assert missed <= 20


def test_hierarchical_interval_of_one_seed_is_over_patients() -> None:
    values = np.random.default_rng(8).normal(1, 0.1, (1, 25))
    interval = hierarchical_interval(values, range(25))
    half = 2.064 * values.std(ddof=1) / 5
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.01)
    constant = hierarchical_interval(np.full((3, 4), 0.5), range(4))
    assert tuple(constant) == (0.5, 0.5, 0.5)


def test_hierarchical_interval_takes_patients_whole_and_skips_what_is_missing() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(5, 30))
    single = hierarchical_interval(values, range(30))
    doubled = hierarchical_interval(np.repeat(values, 2, axis=1), np.repeat(np.arange(30), 2).tolist())
    np.testing.assert_allclose(single, doubled)
    beside = np.concatenate([values, np.full((5, 1), np.nan)], axis=1)
    found = hierarchical_interval(beside, [*range(30), 0])
    np.testing.assert_allclose(found, single)


def test_gap_interval_is_the_share_where_all_gain_alike() -> None:
    gaps = np.random.default_rng(5).uniform(0.02, 0.1, (3, 25))
    assert tuple(gap_interval(0.5 * gaps, gaps, range(25))) == pytest.approx((0.5, 0.5, 0.5))


def test_gap_interval_agrees_with_that_of_the_gain() -> None:
    rng = np.random.default_rng(7)
    signs = set()
    for mean in (0.0, 0.005, 0.01, 0.02, 0.04):
        gains, gaps = mean + rng.normal(0, 0.02, (3, 25)), 0.05 + rng.normal(0, 0.02, (3, 25))
        gain, share = hierarchical_interval(gains, range(25)), gap_interval(gains, gaps, range(25))
        assert (gain.low > 0) == (share.low > 0)
        signs.add(gain.low > 0)
    assert signs == {True, False}


def test_gap_interval_holds_the_true_share_as_often_as_it_says() -> None:
    """Comparator, arm and ceiling with seeds of their own; the arm closes 0.4 of the gap."""
    rng, held = np.random.default_rng(8), 0
    for _ in range(100):
        levels = np.array([0.80, 0.82, 0.85])[:, None, None]
        seeds = rng.normal(0, 0.003, (3, 3, 1))
        dice = levels + seeds + rng.normal(0, 0.05, (1, 1, 25)) + rng.normal(0, 0.02, (3, 3, 25))
        interval = gap_interval(dice[1] - dice[0], dice[2] - dice[0], range(25), resamples=500)
        held += interval.low <= 0.4 <= interval.high
    assert held >= 88


def test_no_share_where_there_is_no_gap() -> None:
    gaps = np.random.default_rng(9).normal(0, 0.05, (3, 25))
    with pytest.raises(DiffaugError, match="not above the comparator"):
        gap_interval(gaps, gaps, range(25))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_signed_rank_sees_clusters_not_cases() -> None:
    gains = np.random.default_rng(6).normal(0.3, 1, (1, 20))
    alone = signed_rank(gains, range(20))
    copied = signed_rank(np.repeat(gains, 5, axis=1), np.repeat(np.arange(20), 5).tolist())
    assert copied == pytest.approx(alone)
    assert signed_rank(np.zeros((2, 6)), range(6)) == 1.0
