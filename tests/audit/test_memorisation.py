"""Memorisation in a space, searches for copies, and their list."""

from collections.abc import Sequence

import numpy as np
import pytest

from diffaug.audit.features import NamedSearch
from diffaug.audit.memorisation import list_suspects, measure_memorisation, record_copies
from diffaug.audit.record import Suspect
from diffaug.audit.volumes import Sets
from diffaug.evaluation.memorisation import CLEAR, Copies, Search, find_copies
from diffaug.progress import Progress
from tests.audit.world import case_set, intensities_of, standard_sets

QUIET = Progress(quiet=True)


# -------- one space


def test_copies_move_every_figure_away_from_held_out_cases() -> None:
    sets = standard_sets(synthetic=20, training=20, held_out=16)
    noise = np.random.default_rng(1).normal(0, 0.1, sets.training.images.shape)
    copies = sets._replace(synthetic=case_set("copy", sets.training.images + noise))
    found = measure_memorisation(intensities_of(copies), sets)
    # Eight of twenty copies are drawn each time.
    assert found.matched == 8
    assert found.memorised_share == pytest.approx(0.4 + 0.6 * found.memorised_null, abs=0.1)
    # All of sixteen subset members, of twenty copies.
    assert found.balance.value == pytest.approx(0.5 + 16 / 40, abs=0.06)
    assert found.balance.low > 0.5
    assert found.balance_cases == 16
    assert found.authentic_share == 0
    assert found.authentic_null > 0.2
    assert found.neighbour_ratio < 0.1 < 0.5 < found.neighbour_ratio_null
    assert tuple(found.membership_auc.model_dump().values()) == (1, 1, 1)


def test_strangers_figures_are_those_of_held_out_cases() -> None:
    sets = standard_sets(synthetic=40, training=40, held_out=40, seed=4)
    found = measure_memorisation(intensities_of(sets), sets)
    assert found.memorised_share == pytest.approx(found.memorised_null, abs=0.1)
    assert found.balance.low < 0.5 < found.balance.high
    assert found.membership_auc.low < 0.5 < found.membership_auc.high
    assert found.authentic_share == pytest.approx(found.authentic_null, abs=0.25)
    assert found.neighbour_ratio == pytest.approx(found.neighbour_ratio_null, abs=0.1)


# -------- searches


Rows = Sequence[Sequence[float]]


def found_in(**searches: tuple[Rows, Rows]) -> tuple[list[NamedSearch], Copies, Sets]:
    """What searches with these similarities find among as many cases."""
    named = [
        NamedSearch(name, f"by {name}", Search(np.array(synthetic), np.array(held_out)))
        for name, (synthetic, held_out) in searches.items()
    ]
    first = named[0].similarities
    copies = find_copies([search.similarities for search in named], range(len(first.held_out)))
    counts = len(first.synthetic), first.synthetic.shape[1], len(first.held_out)
    return named, copies, standard_sets(*counts)


def test_suspects_are_listed_with_their_training_cases_the_most_alike_first() -> None:
    found = found_in(
        encoder=([[0.1, 0.97, 0.2], [0.3, 0.2, 0.1], [0.82, 0.1, 0.1]], [[0.8, 0, 0], [0.1, 0.2, 0]]),
    )
    assert list_suspects(*found) == [
        Suspect(
            synthetic="synthetic_0", training="training_1", search="encoder", similarity=0.97, clear=True
        ),
        Suspect(
            synthetic="synthetic_2", training="training_0", search="encoder", similarity=0.82, clear=False
        ),
    ]
    record = record_copies(*found)
    assert (record.copies, record.clear_copies) == (2, 1)
    assert (record.training_cases, record.training_patients) == (2, 2)
    assert [(s.name, s.title, s.copies, s.clear_copies) for s in record.searches] == [
        ("encoder", "by encoder", 2, 1)
    ]
    assert record.searches[0].clear_threshold == pytest.approx(1 - 0.2 * CLEAR)


def test_a_case_is_listed_once_by_the_search_that_it_exceeds_most() -> None:
    real = [[0.5, 0.0], [0.5, 0.0]]
    found = found_in(first=([[0.6, 0.1], [0.1, 0.7]], real), second=([[0.1, 0.72], [0.6, 0.1]], real))
    listed = [(s.synthetic, s.training, s.search) for s in list_suspects(*found)]
    assert listed == [
        ("synthetic_0", "training_1", "second"),
        ("synthetic_1", "training_1", "first"),
    ]


def test_clear_copies_are_listed_as_clear() -> None:
    """A search with a low threshold but one outlying real case must not hide what another finds clearly."""
    outlier = [[0.1]] * 79 + [[0.9]]
    even = [[0.8]] * 80
    found = found_in(first=([[1 - 1.2 * CLEAR * 0.1]], outlier), second=([[1 - 0.8 * CLEAR * 0.2]], even))
    assert found[1].searches[0].clearly.tolist() == [False]
    assert found[1].searches[1].clearly.tolist() == [True]
    record, suspects = record_copies(*found), list_suspects(*found)
    assert record.clear_copies == 1
    assert [suspect.clear for suspect in suspects] == [True]


def test_without_suspects_the_list_is_empty() -> None:
    found = found_in(encoder=([[0.1, 0.2]], [[0.8, 0.1], [0.9, 0.1]]))
    assert list_suspects(*found) == []
    assert record_copies(*found).copies == 0
