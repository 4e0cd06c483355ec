"""Feature spaces: similarities are correlations of features, mirror images and tables of the user's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffaug.audit.features import (
    MOST_POOLED,
    Space,
    encoder_space,
    intensity_space,
    matrix_space,
    network_space,
)
from diffaug.audit.volumes import Sets
from diffaug.errors import DiffaugError
from diffaug.evaluation.alignment import aligned_correlations
from diffaug.evaluation.embedding import Embedder, embed, embed_mirrored, embed_shifted
from diffaug.evaluation.memorisation import correlations
from diffaug.progress import Progress
from tests.audit.world import case_set, standard_sets

QUIET = Progress(quiet=True)


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
    space = intensity_space(sets, QUIET)
    check_similarities(space)
    assert np.array_equal(space.training, sets.training.images.reshape(20, -1))
    assert space.synthetic_to_training[0].argmax() == 3
    assert space.synthetic_to_training[0, 3] == pytest.approx(1, abs=1e-5)


def test_searches_look_at_shifted_and_at_mirrored_cases(sets: Sets) -> None:
    space = intensity_space(sets, QUIET)
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
    space = intensity_space(sets, QUIET)
    held_out, training = sets.held_out.batch(range(12)), sets.training.batch(range(20))
    plain, mirrored = (search.similarities for search in space.searches)
    assert np.allclose(plain.held_out, aligned_correlations(held_out, training, 2), atol=1e-5)
    flips = [(2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
    views = [aligned_correlations(held_out.flip(axes), training, 2) for axes in flips]
    assert np.allclose(mirrored.held_out, torch.stack(views).amax(0), atol=1e-5)


def test_only_intensities_are_decisive(sets: Sets, embedder: Embedder) -> None:
    for space, decisive in (
        (intensity_space(sets, QUIET), True),
        (encoder_space(embedder, sets, QUIET), False),
    ):
        assert [search.similarities.decisive for search in space.searches] == [decisive, decisive]


def test_large_volumes_are_averaged_before_they_are_compared() -> None:
    rng = np.random.default_rng(1)
    sets = Sets(*(case_set(name, rng.normal(size=(3, 32, 16, 24))) for name in ("s", "t", "h")))
    space = intensity_space(sets, QUIET)
    assert MOST_POOLED / 2 < space.training.shape[1] <= MOST_POOLED
    sides = 32 * 16 * 24 / space.training.shape[1]
    assert space.training.mean() == pytest.approx(sets.training.images.astype(float).mean(), abs=0.02)
    assert space.training.std() < 1.5 / np.sqrt(sides)
    check_similarities(space)


def test_the_encoders_space_is_of_its_embeddings(sets: Sets, embedder: Embedder) -> None:
    space = encoder_space(embedder, sets, QUIET)
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
    space = intensity_space(copies, QUIET)
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
