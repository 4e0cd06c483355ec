"""Feature spaces: similarities are correlations of features, mirror images and tables of the user's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from diffaug.audit.features import (
    MOST_POOLED,
    NamedSearch,
    Space,
    encoder_space,
    intensity_space,
    matrix_space,
    network_space,
    twins,
)
from diffaug.audit.volumes import Sets
from diffaug.errors import DiffaugError
from diffaug.evaluation.alignment import aligned_correlations, registered_correlations
from diffaug.evaluation.embedding import Embedder, embed, embed_mirrored, embed_shifted
from diffaug.evaluation.memorisation import Search
from diffaug.progress import Progress
from tests.audit.world import case_set, intensities_of, standard_sets

QUIET = Progress(quiet=True)


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of rows."""
    return np.corrcoef(first, second)[: len(first), len(first) :]


@pytest.fixture
def sets() -> Sets:
    """More cases than one batch; the first samples are training cases: as it is, mirrored, and shifted."""
    sets = standard_sets()
    images = sets.synthetic.images.copy()
    images[0], images[1] = sets.training.images[3], sets.training.images[5][:, ::-1, :, ::-1]
    images[2][:, 2:, :-1, 1:] = sets.training.images[7][:, :-2, 1:, :-1]
    return sets._replace(synthetic=case_set("synthetic", images))


@pytest.fixture
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(1).eval().requires_grad_(False)


def check_similarities(space: Space) -> None:
    """Each matrix holds the correlations of its features."""
    for found, rows, columns in (
        (space.synthetic_to_training, space.synthetic, space.training),
        (space.synthetic_to_held_out, space.synthetic, space.held_out),
        (space.held_out_to_training, space.held_out, space.training),
        (space.training_to_training, space.training, space.training),
    ):
        assert np.allclose(found, correlations(rows, columns), atol=1e-5)


def test_intensities_are_compared_voxel_by_voxel(sets: Sets) -> None:
    space = intensities_of(sets)
    check_similarities(space)
    assert np.array_equal(space.training, sets.training.images.reshape(20, -1))
    assert space.synthetic_to_training[0].argmax() == 3
    assert space.synthetic_to_training[0, 3] == pytest.approx(1, abs=1e-5)


def test_searches_look_at_shifted_and_at_mirrored_cases(sets: Sets) -> None:
    space = intensities_of(sets)
    plain, mirrored = space.searches
    assert (plain.name, plain.title) == ("intensities", "raw intensities")
    assert (mirrored.name, mirrored.title) == ("intensities, mirrored", "raw intensities, mirrored")
    similarities = plain.similarities.synthetic
    assert similarities[0, 3] == pytest.approx(1, abs=1e-5)
    assert similarities[2, 7] == pytest.approx(1, abs=1e-5)
    assert similarities[1, 5] < 0.9
    similarities = mirrored.similarities.synthetic
    assert similarities[1, 5] == pytest.approx(1, abs=1e-5)
    # The volume itself is none of its mirror images.
    assert similarities[0, 3] < 0.9


def test_intensities_are_compared_at_the_best_shift(sets: Sets) -> None:
    space = intensities_of(sets)
    held_out, training = sets.held_out.batch(range(12)), sets.training.batch(range(20))
    flips = [(2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
    for search, axes in zip(space.searches, ([()], flips), strict=True):
        aligned = torch.stack([aligned_correlations(held_out.flip(a), training, 2) for a in axes]).amax(0)
        found = torch.from_numpy(search.similarities.held_out).float()
        # The two nearest may be turned and stretched, too; then they are no less alike.
        assert (found > aligned - 1e-5).all()
        assert ((found - aligned).abs() > 1e-5).sum(1).max() <= 3
        nearest = aligned.argmax(1)
        assert (found[range(12), nearest] > aligned[range(12), nearest] + 0.01).any()


def test_what_another_search_found_is_turned_and_stretched() -> None:
    """A training case turned so far that others are more alike as they are."""
    sets = standard_sets()
    turned = ndimage.rotate(sets.training.images[4][0].astype(float), 15, reshape=False, mode="nearest")
    images = sets.synthetic.images.copy()
    images[0] = turned
    sets = sets._replace(synthetic=case_set("synthetic", images))
    hint = np.zeros((len(sets.synthetic), len(sets.training)))
    hint[0, 4] = 1
    nothing = np.zeros((len(sets.held_out), len(sets.training)))
    hints = [NamedSearch(name, name, Search(hint, nothing)) for name in "ab"]
    found = intensity_space(sets, hints, QUIET).searches[0].similarities.synthetic[0]
    pair = sets.synthetic.batch([0]), sets.training.batch([4])
    assert found[4] == pytest.approx(float(registered_correlations(*pair)), abs=1e-5)
    assert found.argmax() == 4


def test_twins_are_named_as_they_are_or_mirrored(sets: Sets) -> None:
    assert twins(sets) == []
    images = sets.held_out.images.copy()
    images[2], images[5] = sets.training.images[3], sets.training.images[6][:, ::-1]
    doubled = sets._replace(held_out=case_set("held_out", images))
    names = sets.training.names
    assert twins(doubled) == [("held_out_2", names[3]), ("held_out_5", names[6])]


def test_the_balance_of_intensities_is_at_the_best_shift(sets: Sets) -> None:
    space = intensities_of(sets)
    made = sets.synthetic.batch(range(18))
    for found, cases in (
        (space.balance_to_training, sets.training),
        (space.balance_to_held_out, sets.held_out),
    ):
        expected = aligned_correlations(made, cases.batch(range(len(cases))), 2)
        assert np.allclose(found, expected, atol=1e-5)
    assert space.balance_to_training[2].argmax() == 7


def test_only_intensities_are_decisive(sets: Sets, embedder: Embedder) -> None:
    for space, decisive in (
        (intensities_of(sets), True),
        (encoder_space(embedder, embedder, sets, QUIET), False),
    ):
        assert [search.similarities.decisive for search in space.searches] == [decisive, decisive]


def test_large_volumes_are_averaged_before_they_are_compared() -> None:
    rng = np.random.default_rng(1)
    sets = Sets(*(case_set(name, rng.normal(size=(3, 32, 16, 24))) for name in ("s", "t", "h")))
    space = intensities_of(sets)
    assert MOST_POOLED / 2 < space.training.shape[1] <= MOST_POOLED
    sides = 32 * 16 * 24 / space.training.shape[1]
    assert space.training.mean() == pytest.approx(sets.training.images.astype(float).mean(), abs=0.02)
    assert space.training.std() < 1.5 / np.sqrt(sides)
    check_similarities(space)


def test_the_encoders_space_is_of_its_embeddings(sets: Sets, embedder: Embedder) -> None:
    space = encoder_space(embedder, embedder, sets, QUIET)
    check_similarities(space)
    volumes = sets.synthetic.batch(range(18))
    assert np.allclose(space.synthetic, embed(embedder, volumes), atol=0.05)
    for search, views in zip(
        space.searches, (embed_shifted(embedder, volumes), embed_mirrored(embedder, volumes)), strict=True
    ):
        expected = np.max([correlations(view, space.training) for view in views.unbind(1)], 0)
        assert np.allclose(search.similarities.synthetic, expected, atol=0.02)


def test_a_network_gives_features_and_one_search(sets: Sets) -> None:
    class Corners(nn.Module):
        def forward(self, volumes: Tensor) -> Tensor:
            return volumes[:, :, ::7, ::7, ::7]

    space = network_space("corners", Corners(), sets, QUIET)
    check_similarities(space)
    assert np.array_equal(space.held_out, sets.held_out.images[:, :, ::7, ::7, ::7].reshape(12, 8))
    (search,) = space.searches
    assert (search.name, search.title) == ("network", "corners with your weights")
    assert np.allclose(search.similarities.synthetic, space.synthetic_to_training, atol=1e-6)
    assert np.allclose(search.similarities.held_out, space.held_out_to_training, atol=1e-6)


def test_similarities_are_at_most_one(sets: Sets) -> None:
    """Rounding must not make a copy more than equal, or its distance negative."""
    copies = sets._replace(synthetic=case_set("synthetic", sets.training.images))
    space = intensities_of(copies)
    searched = space.searches[0].similarities.synthetic
    for similarities in (space.synthetic_to_training, space.training_to_training, searched):
        assert similarities.max() <= 1


# -------- a table of the user's


@pytest.fixture
def few() -> Sets:
    return Sets(*(case_set(name, np.zeros((2, 8, 8, 8))) for name in ("s", "t", "h")))


ROWS = {
    "s_0": "1,2,7,4",
    "s_1": "0,-1,7,9",
    "t_0": "2,10,5,1",
    "t_1": "4,30,5,0",
    "h_0": "3,20,6,1",
    "h_1": "0,0,0,0",
}


def table(folder: Path, rows: dict[str, str] | None = None, head: str = "case,a,b,c,d") -> Path:
    file = folder / "mine.csv"
    file.write_text(
        "\n".join([head, *(f"{n},{v}" for n, v in (ROWS if rows is None else rows).items())]) + "\n"
    )
    return file


def test_a_table_is_standardised_by_the_training_cases(few: Sets, tmp_path: Path) -> None:
    space = matrix_space(table(tmp_path), few)
    check_similarities(space)
    # Means 3, 20, 5 and 0.5, deviations 1, 10, none and 0.5.
    assert space.training.tolist() == [[-1, -1, 0, 1], [1, 1, 0, -1]]
    assert space.held_out.tolist() == [[0, 0, 1, 1], [-3, -2, -5, -1]]
    assert np.allclose(space.synthetic, [[-2, -1.8, 2, 7], [-3, -2.1, 2, 17]])
    (search,) = space.searches
    assert (search.name, search.title) == ("features", "your features (mine.csv)")
    assert np.allclose(search.similarities.synthetic, space.synthetic_to_training, atol=1e-6)


def test_names_that_two_sets_share_are_refused(few: Sets, tmp_path: Path) -> None:
    twice = few._replace(training=few.synthetic)
    with pytest.raises(DiffaugError, match=r"two sets have a case s_0, and .*mine\.csv can have one row"):
        matrix_space(table(tmp_path), twice)


def test_rows_are_found_by_name_in_any_order_among_others(few: Sets, tmp_path: Path) -> None:
    expected = matrix_space(table(tmp_path), few)
    file = table(tmp_path, {"another": "9,9,9,9", **dict(reversed(ROWS.items()))})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n").replace(b"s_0,", b" s_0 ,"))
    found = matrix_space(file, few)
    assert np.array_equal(found.synthetic, expected.synthetic)
    assert np.array_equal(found.synthetic_to_training, expected.synthetic_to_training)


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ({**ROWS, "h_1": "0,0,0,high"}, "case,a,b,c,d", "cannot be read as a table .*'high'"),
        ({**ROWS, "h_1": "0,0,0"}, "case,a,b,c,d", "cannot be read as a table"),
        ({**ROWS, "h_1": "0,0,0,nan"}, "case,a,b,c,d", "no finite numbers"),
        ({**ROWS, "h_1": "0,0,0,-inf"}, "case,a,b,c,d", "no finite numbers"),
        ({**ROWS, " s_0": "1,2,3,4"}, "case,a,b,c,d", "names the case s_0 twice"),
        (
            {k: v for k, v in ROWS.items() if k != "t_1"},
            "case,a,b,c,d",
            "no features of 1 cases, such as t_1",
        ),
        (ROWS, "name,a,b,c,d", "must have the columns case"),
        ({}, "case,a,b,c,d", "must have the columns case"),
        (dict.fromkeys(ROWS, ""), "case,a", "cannot be read as a table"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(
    few: Sets, tmp_path: Path, rows: dict[str, str], head: str, message: str
) -> None:
    file = table(tmp_path, rows, head)
    with pytest.raises(DiffaugError, match=message) as caught:
        matrix_space(file, few)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"case\ns_0\n", b"\xff\xfe\x00 no text", b"\x00" * 40])
def test_files_that_are_no_tables_are_refused(few: Sets, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(content)
    with pytest.raises(DiffaugError, match=r"mine\.csv"):
        matrix_space(file, few)
    with pytest.raises(DiffaugError, match=r"no\.csv cannot be read"):
        matrix_space(tmp_path / "no.csv", few)


def test_an_empty_line_at_the_end_of_a_table_does_not_matter(few: Sets, tmp_path: Path) -> None:
    file = table(tmp_path)
    file.write_text(file.read_text() + "\n")
    assert matrix_space(file, few).training.tolist() == [[-1, -1, 0, 1], [1, 1, 0, -1]]
