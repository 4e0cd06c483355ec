from typing import Any

import numpy as np
import pytest
import torch

from diffaug.errors import DiffaugError
from diffaug.generators.seeds import CaseNoise, case_seed, case_seeds


def test_case_seeds_do_not_depend_on_the_number_of_cases() -> None:
    assert case_seeds(7, 3) == case_seeds(7, 10)[:3]
    assert case_seeds(7, 3) == [case_seed(7, index) for index in range(3)]
    assert case_seeds(np.int64(7), 3) == case_seeds(7, 3)


def test_seeds_of_different_roots_and_cases_differ() -> None:
    seeds = {case_seed(root, index) for root in range(40) for index in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_stay_what_they_are() -> None:
    """Recorded seeds must mean the same case in every later version."""
    assert [case_seed(0, 0), case_seed(0, 1), case_seed(2024, 5)] == [
        7896617691693857887,
        2918264622725855778,
        1245772489238135056,
    ]


def test_a_sequence_of_seeds_is_used_as_it_is() -> None:
    assert case_seeds([5, 5, 2], 3) == [5, 5, 2]
    assert case_seeds(np.array([1, 2]), 2) == [1, 2]
    with pytest.raises(DiffaugError, match="2 seeds were given for 3 cases"):
        case_seeds([1, 2], 3)


@pytest.mark.parametrize("seed", [-1, 1.5, [0, -3], [1, 2.0], 2**63])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(DiffaugError, match="a seed is an integer"):
        case_seeds(seed, 2)


def test_noise_of_a_case_depends_on_its_seed_alone() -> None:
    alone = CaseNoise([11]).draw((2, 3, 4, 5))
    among = CaseNoise([3, 11, 8]).draw((2, 3, 4, 5))
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[0], among[2])
    stream, whole = CaseNoise([11]), CaseNoise([3, 11])
    assert torch.equal(stream.draw((2, 3)), whole.draw((2, 3))[1:])
    assert torch.equal(stream.draw((4,)), whole.draw((4,))[1:])
    state = torch.random.get_rng_state()
    CaseNoise([11]).draw((2,))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_is_standard_normal() -> None:
    noise = CaseNoise(case_seeds(0, 4)).draw((50, 100, 10))
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    # Cases of one run are independent of each other.
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.02
