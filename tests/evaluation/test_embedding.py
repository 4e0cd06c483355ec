"""The embedding: its loss against closed forms, and what a short training does."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.evaluation import embedding
from diffaug.evaluation.alignment import correlations
from diffaug.evaluation.embedding import (
    BLEND,
    MIRRORED,
    SHIFTED,
    SIZE,
    Embedder,
    embed,
    embed_mirrored,
    embed_shifted,
    fit_embedder,
    nt_xent,
    view,
)
from diffaug.evaluation.segmenter import standardise


def smooth_volumes(count: int, seed: int = 0, channels: int = 1) -> Tensor:
    """Standardised random fields."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, channels, 16, 16, 16))
    return standardise(torch.from_numpy(gaussian_filter(noise, (0, 0, 3, 3, 3))))


def picked_from(volumes: Tensor) -> Callable[[Sequence[int]], Tensor]:
    return lambda rows: volumes[list(rows)]


@pytest.fixture(scope="module")
def volumes() -> Tensor:
    return smooth_volumes(24)


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of the steps of `trained`, once that is asked for."""
    return []


@pytest.fixture(scope="module")
def trained(volumes: Tensor, losses: list[float]) -> Embedder:
    return fit_embedder(
        picked_from(volumes), range(24), steps=60, seed=0, on_step=lambda _, loss: losses.append(loss)
    )


# -------- the loss


# Rows of zero mean at right angles.
CROSSED = torch.tensor([[1.0, -1, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0], [0, 0, 0, 0, 1, -1]])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_of_cases_at_right_angles(temperature: float) -> None:
    loss = nt_xent(CROSSED, 3 * CROSSED + 7, torch.arange(3), temperature)
    # One positive of correlation 1 and four negatives of correlation 0.
    assert loss.item() == pytest.approx(math.log(1 + 4 * math.exp(-1 / temperature)), rel=1e-3)


def test_loss_of_cases_that_are_all_alike() -> None:
    alike = CROSSED[:1].expand(5, -1)
    assert nt_xent(alike, alike, torch.arange(5)).item() == pytest.approx(math.log(9), rel=1e-5)


def test_loss_of_views_that_are_opposite() -> None:
    loss = nt_xent(CROSSED[:2], -CROSSED[:2], torch.arange(2), 1.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(1)), rel=1e-5)


def test_other_scans_of_a_patient_are_no_negatives() -> None:
    alike = CROSSED[:1].expand(3, -1)
    assert nt_xent(alike, alike, torch.tensor([4, 4, 4])).item() == pytest.approx(0, abs=1e-6)
    # The scans of the first patient have two negatives, that of the second four.
    found = nt_xent(alike, alike, torch.tensor([0, 0, 1])).item()
    assert found == pytest.approx((2 * math.log(3) + math.log(5)) / 3, rel=1e-5)


def test_loss_has_a_gradient_whoever_is_masked() -> None:
    first = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nt_xent(first, CROSSED[[0, 0, 1, 2]], torch.tensor([0, 0, 0, 1])).backward()
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert (first.grad != 0).any(1).all()


# -------- views and mirror images


def test_seven_mirror_images_differ_from_the_volume_and_each_other(volumes: Tensor) -> None:
    assert len(set(MIRRORED)) == 7
    images = [volumes, *(volumes.flip(axes) for axes in MIRRORED)]
    for n, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:n])


def test_mirrored_embeddings_are_those_of_flipped_volumes(trained: Embedder, volumes: Tensor) -> None:
    found = embed_mirrored(trained, volumes[:3])
    assert found.shape == (3, 7, SIZE)
    for n, axes in enumerate(MIRRORED):
        assert torch.equal(found[:, n], embed(trained, volumes[:3].flip(axes)))


def test_shifted_embeddings_are_of_the_volume_and_of_rolled_ones(trained: Embedder, volumes: Tensor) -> None:
    found = embed_shifted(trained, volumes[:3])
    assert found.shape == (3, len(SHIFTED), SIZE)
    assert len(set(SHIFTED)) == len(SHIFTED) > 1
    assert torch.equal(found[:, 0], embed(trained, volumes[:3]))
    for n, shift in enumerate(SHIFTED):
        assert torch.equal(found[:, n], embed(trained, volumes[:3].roll(shift, (2, 3, 4))))


def test_views_keep_shape_and_input_and_depend_on_the_generator(volumes: Tensor) -> None:
    before = volumes.clone()
    first, again = (view(volumes, torch.Generator().manual_seed(2)) for _ in range(2))
    other = view(volumes, torch.Generator().manual_seed(3))
    assert first.shape == volumes.shape
    assert torch.isfinite(first).all()
    assert torch.equal(volumes, before)
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).flatten(1).all(1).any()


def test_a_view_is_most_of_all_its_own_case() -> None:
    # A constant volume stays one under turning, rolling and bending; blending mixes in at most `BLEND`.
    levels = torch.tensor([0.0, 100.0]).repeat(20)
    random = torch.Generator().manual_seed(4)
    altered = view(levels.view(-1, 1, 1, 1, 1).expand(-1, 1, 8, 8, 8).contiguous(), random)
    means = altered.mean((1, 2, 3, 4))
    assert means[levels == 0].max() < 100 * BLEND * math.exp(0.4) + 2
    assert means[levels == 0].max() > 5
    assert means[levels == 100].min() > 100 * (1 - BLEND) * math.exp(-0.4) - 2


# -------- training


def test_weights_depend_on_the_seed_and_leave_the_global_generator_alone(volumes: Tensor) -> None:
    before = torch.random.get_rng_state()
    models = [
        fit_embedder(picked_from(volumes), range(24), steps=2, seed=seed, batch=6) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_a_stopped_training_goes_on_to_the_same_weights(
    volumes: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "CHECKPOINT_EVERY", 4)
    file = tmp_path / "encoder.training"
    whole = fit_embedder(picked_from(volumes), range(24), steps=12, seed=0, batch=10)
    steps: list[int] = []

    def stop(step: int, _: float) -> None:
        steps.append(step)
        if step == 6:
            raise KeyboardInterrupt

    arguments = {"steps": 12, "seed": 0, "batch": 10, "checkpoint": file, "on_step": stop}
    with pytest.raises(KeyboardInterrupt):
        fit_embedder(picked_from(volumes), range(24), **arguments)
    again = fit_embedder(
        picked_from(volumes), range(24), **arguments | {"on_step": lambda step, _: steps.append(step)}
    )
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10, 11, 12]
    assert not file.exists()
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_reports_each_step_and_leaves_a_frozen_model() -> None:
    volumes = smooth_volumes(5, channels=2)
    steps = []
    model = fit_embedder(
        picked_from(volumes), "aabbc", steps=3, seed=0, on_step=lambda step, loss: steps.append((step, loss))
    )
    assert [step for step, _ in steps] == [1, 2, 3]
    assert np.isfinite([loss for _, loss in steps]).all()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert embed(model, volumes).shape == (5, SIZE)


@pytest.mark.parametrize("patients", [["a"], ["a", "a"], []])
def test_one_patient_teaches_nothing(patients: list[str]) -> None:
    with pytest.raises(DiffaugError, match="two patients are needed"):
        fit_embedder(picked_from(smooth_volumes(2)), patients, steps=1, seed=0)


def test_sides_must_be_multiples_of_eight() -> None:
    volumes = torch.zeros(2, 1, 16, 12, 16)
    with pytest.raises(DiffaugError, match=r"\(16, 12, 16\) voxels: pad each side to a multiple of 8"):
        fit_embedder(picked_from(volumes), "ab", steps=1, seed=0)


def recognised(model: Embedder, volumes: Tensor) -> tuple[float, float]:
    """Share of altered views whose own case is nearest, and how much more alike it is than other cases."""
    shares, margins = [], []
    for seed in range(4):
        altered = view(volumes, torch.Generator().manual_seed(seed))
        found = correlations(embed(model, altered), embed(model, volumes))
        own = found.diagonal()
        others = (found.sum(1) - own) / (len(found) - 1)
        shares.append((own == found.amax(1)).float().mean().item())
        margins.append((own - others).mean().item())
    return float(np.mean(shares)), float(np.mean(margins))


def test_a_short_training_makes_altered_views_more_alike_than_other_cases(
    trained: Embedder, volumes: Tensor, losses: list[float]
) -> None:
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    share, margin = recognised(trained, volumes)
    # One of 24 would be chance.
    assert share > 0.5
    assert margin > 0.4


def test_it_knows_altered_views_of_cases_that_it_has_not_seen(trained: Embedder) -> None:
    unseen = smooth_volumes(24, seed=9)
    share, margin = recognised(trained, unseen)
    torch.manual_seed(0)
    untrained, _ = recognised(Embedder(1).eval(), unseen)
    assert share > max(0.35, 1.5 * untrained)
    assert margin > 0.3


def test_an_embedding_is_of_one_case_whatever_its_batch(trained: Embedder, volumes: Tensor) -> None:
    together = embed(trained, volumes)
    alone = torch.cat([embed(trained, volume[None]) for volume in volumes])
    assert torch.allclose(together, alone, atol=0.05)
    assert correlations(together, alone).diagonal().min() > 0.999
