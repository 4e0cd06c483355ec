"""Utility: segmenters of synthetic and of real cases, told apart by the names of labels."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import diffaug.audit.utility
from diffaug.audit.auditing import Part
from diffaug.audit.record import Utility
from diffaug.audit.utility import measure_utility
from diffaug.errors import DiffaugError
from diffaug.evaluation.segmenter import Segmenter
from diffaug.progress import Progress
from tests.audit.world import GRID, SHAPE, Person, Scan, World, part, write_decathlon


def utility(synthetic: Part, training: Part, held_out: Part, folder: Path, steps: int = 2) -> Utility:
    sets = ((p.dataset, p.cases) for p in (synthetic, training, held_out))
    return measure_utility(
        *sets,
        grid=GRID,
        segmenter=folder / "segmenter.safetensors",
        progress=Progress(quiet=True),
        steps=steps,
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of each training of a segmenter, which is left out."""
    found: list[tuple[Tensor, Tensor]] = []

    def fit(images: Tensor, labels: Tensor, *, classes: int, **options: object) -> Segmenter:
        found.append((images, labels))
        torch.manual_seed(0)
        return Segmenter(images.shape[1], classes).eval().requires_grad_(False)

    monkeypatch.setattr(diffaug.audit.utility, "fit_segmenter", fit)
    return found


def test_segmenters_are_trained_and_scored(world: World, tmp_path: Path) -> None:
    found = utility(part(world.honest), world.training, world.held_out, tmp_path, steps=12)
    assert (found.training_cases, found.steps) == (24, 12)
    for name in ("synthetic_tested_on_real", "real_tested_on_real", "real_tested_on_synthetic"):
        figure = getattr(found, f"trained_on_{name}")
        assert 0 < figure.low <= figure.value <= figure.high < 1
    again = utility(part(world.honest), world.training, world.held_out, tmp_path, steps=12)
    assert again == found


def test_scores_are_dice_of_the_right_segmenter_on_the_right_cases(
    world: World, seen: list[tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Segmenter] = []
    fit = diffaug.audit.utility.fit_segmenter

    def remember(*arguments: Tensor, **options: object) -> Segmenter:
        trained.append(fit(*arguments, **options))  # type: ignore[arg-type]
        return trained[-1]

    def predict(model: Segmenter, images: Tensor) -> Tensor:
        """That of synthetic cases finds nothing, that of real ones the core of synthetic, all of others."""
        if model is trained[0]:
            return torch.zeros(len(images), 1, *SHAPE, dtype=torch.int16)
        labels = seen[0][1]
        return labels.where(labels != 2, 0) if len(images) == 24 else torch.ones(len(images), 1, *SHAPE)

    monkeypatch.setattr(diffaug.audit.utility, "fit_segmenter", remember)
    monkeypatch.setattr(diffaug.audit.utility, "predict", predict)
    found = utility(part(world.honest), world.training, world.held_out, tmp_path)
    assert [len(images) for images, _ in seen] == [24, 30]
    assert found.trained_on_synthetic_tested_on_real.value == 0
    # All of the core and nothing of the shell.
    assert found.trained_on_real_tested_on_synthetic.value == pytest.approx(0.5)
    assert 0 < found.trained_on_real_tested_on_real.value < 0.2


def test_labels_are_matched_by_name(world: World, seen: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    """Numbers may differ, and names that only some sets have are background."""
    people = np.random.default_rng(0)
    scans = {f"x_{number:02d}": Person(people).scan() for number in range(4)}
    # What others call 1 and 2 is 5 and 3 here; 4 is known to nobody else.
    swapped = {
        name: Scan(scan.image, np.array([0, 5, 3, 0, 4], np.uint8)[scan.label])
        for name, scan in scans.items()
    }
    for scan in swapped.values():
        scan.label[0, 0] = 4
    labels = {"background": 0, "shell": 3, "cable": 4, "core": 5}
    other = part(write_decathlon(tmp_path / "Other", swapped, labels=labels))
    plain = part(write_decathlon(tmp_path / "Plain", scans))
    utility(other, plain, world.held_out, tmp_path)
    (_, made), (images, real) = seen
    assert images.shape == (4, 1, *SHAPE)
    assert made.shape == real.shape == (4, 1, *SHAPE)
    # Numbered as the synthetic dataset lists them.
    for number, scan in enumerate(scans.values()):
        expected = torch.from_numpy(np.array([0, 2, 1], np.int16)[scan.label])
        assert torch.equal(real[number, 0].short(), expected)
        expected[0, 0] = 0
        assert torch.equal(made[number, 0].short(), expected)


def test_cases_without_label_map_are_left_out(
    world: World, seen: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    made = part(world.honest)
    some = [dataclasses.replace(case, label=None) if n % 3 else case for n, case in enumerate(made.cases)]
    found = utility(Part(made.dataset, some), world.training, world.held_out, tmp_path)
    assert found.training_cases == len(seen[0][0]) == 8


@pytest.mark.parametrize("role", ["synthetic", "training", "held_out"])
def test_sets_without_any_label_map_are_refused(
    world: World, seen: list[tuple[Tensor, Tensor]], tmp_path: Path, role: str
) -> None:
    sets = {"synthetic": part(world.honest), "training": world.training, "held_out": world.held_out}
    bare = [dataclasses.replace(case, label=None) for case in sets[role].cases]
    sets[role] = Part(sets[role].dataset, bare)
    with pytest.raises(DiffaugError, match="label"):
        utility(**sets, folder=tmp_path)


def test_labels_of_no_shared_name_are_refused(world: World, tmp_path: Path) -> None:
    scans = {f"x_{number}": Person(np.random.default_rng(number)).scan() for number in range(2)}
    labels = {"background": 0, "kernel": 1, "husk": 2}
    other = part(write_decathlon(tmp_path / "Other", scans, labels=labels))
    with pytest.raises(DiffaugError, match=r"kernel, husk, the training ones background, core, shell"):
        utility(other, world.training, world.held_out, tmp_path)


def test_a_held_out_case_that_shows_nothing_leaves_a_mean_of_the_others(
    world: World, seen: list[tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its label map nor the segmenter's has a label: there is no Dice."""
    people = np.random.default_rng(1)
    scans = {f"x_{number}": Person(people).scan() for number in range(6)}
    scans["x_3"] = Scan(scans["x_3"].image, np.zeros(SHAPE, np.uint8))
    others = part(write_decathlon(tmp_path / "Others", scans))
    monkeypatch.setattr(
        diffaug.audit.utility,
        "predict",
        lambda model, images: torch.zeros(len(images), 1, *SHAPE, dtype=torch.int16),
    )
    found = utility(part(world.honest), world.training, others, tmp_path)
    assert found.trained_on_real_tested_on_real.value == 0
    assert Utility.model_validate_json(found.model_dump_json()) == found
