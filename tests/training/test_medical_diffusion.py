"""Fitting Medical Diffusion: its losses and codebook in closed form, its repairs, and a fit end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffaug.datasets.reading import read_dataset
from diffaug.errors import DiffaugError
from diffaug.files import sha256_file
from diffaug.generators.diffusion import CosineSchedule
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
from diffaug.generators.medical_diffusion.vqgan import Codebook, VQGANConfig
from diffaug.progress import Progress
from diffaug.training.architectures import read_plan
from diffaug.training.cases import Canvases
from diffaug.training.fingerprint import Fingerprint
from diffaug.training.fit import _tell, fit_generator
from diffaug.training.medical_diffusion import codebook
from diffaug.training.medical_diffusion.autoencoder import (
    Reconstruction,
    VQGANTrainer,
    train_autoencoder,
)
from diffaug.training.medical_diffusion.denoiser import noise_loss, train_denoiser
from diffaug.training.medical_diffusion.discriminators import (
    Discriminators,
    PatchDiscriminator,
    adversarial,
    feature_matching,
    hinge,
)
from diffaug.training.medical_diffusion.perceptual import LPIPS, _unit, load_lpips, three_planes
from diffaug.training.medical_diffusion.plan import (
    AutoencoderTraining,
    DenoiserTraining,
    MedicalDiffusionPlan,
)
from diffaug.training.medical_diffusion.planning import (
    fitting_grid,
    plan_axes,
    plan_batch,
    plan_codes,
    plan_factor,
)
from diffaug.training.plan import GridPlan
from diffaug.training.processes import make_accelerator

QUIET = Progress(quiet=True)
KEYS = Path(__file__).parents[1] / "zoo" / "keys" / "medicaldiffusion-vqgan-222.keys.txt"


def medical_plan(steps: int = 6, **autoencoder_training: object) -> MedicalDiffusionPlan:
    """Networks of a few thousand weights; the grid's first axis does not divide by the down-sampling."""
    return MedicalDiffusionPlan(
        name="blobs",
        grid=GridPlan(spacing=(2.0, 2.0, 2.0), shape=(15, 24, 16)),
        channels=["MRI"],
        labels={},
        intensity=IntensityConvention(kind="percentile", typical=[(400.0, 900.0)]),
        autoencoder=VQGANConfig(hidden=4, groups=4, downsampling=(2, 4, 4), codes=32, latent_channels=4),
        denoiser=UNetConfig(channels=4, out_channels=4, dim=8, dim_mults=(1, 2), heads=2, head_dim=4),
        diffusion_steps=20,
        augmentation={},
        autoencoder_training=AutoencoderTraining(
            **{"steps": steps, "discriminator_start": steps // 2} | autoencoder_training
        ),
        denoiser_training=DenoiserTraining(steps=steps, batch=2, rounds=2),
        evaluate_every=2,
        checkpoint_every=1,
    )


def command(dataset: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "diffaug", "fit", str(dataset), "--output", str(output), *more]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    file.write_text(medical_plan().model_dump_json())
    return file


@pytest.fixture(scope="module")
def fitted(blobs: Path, plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fits") / "blobs"
    fit_generator(read_dataset(blobs), output, plan=plan_file, progress=QUIET)
    return output


# -- codebook ------------------------------------------------------------------------------------------------


def latents(seed: int = 0, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_the_codebook_begins_with_latents_of_the_batch() -> None:
    book, z = Codebook(10, 3), latents()
    codebook.initialise(book, z, torch.Generator().manual_seed(1))
    rows = z.movedim(1, -1).reshape(-1, 3)
    assert all((rows == code).all(dim=1).any() for code in book.embeddings)
    assert len(book.embeddings.unique(dim=0)) == 10
    assert torch.equal(book.z_avg, book.embeddings)
    assert torch.equal(book.N, torch.ones(10))


def test_a_batch_smaller_than_the_codebook_is_repeated_with_noise() -> None:
    book, z = Codebook(100, 3), latents(count=1)
    codebook.initialise(book, z, torch.Generator().manual_seed(1))
    rows = z.movedim(1, -1).reshape(-1, 3)
    nearest = (book.embeddings[:, None] - rows).norm(dim=2).amin(dim=1)
    assert 0 < nearest.max() < 0.05
    assert len(book.embeddings.unique(dim=0)) == 100


def test_an_initialised_codebook_is_never_overwritten() -> None:
    """The original forgets on resuming that its codebook was filled, and fills it again."""
    book = Codebook(10, 3)
    codebook.initialise(book, latents(0), torch.Generator().manual_seed(1))
    resumed = Codebook(10, 3)
    resumed.load_state_dict(book.state_dict())
    codebook.initialise(resumed, latents(5), torch.Generator().manual_seed(2))
    assert torch.equal(resumed.embeddings, book.embeddings)


def test_codes_follow_the_moving_average_of_their_latents() -> None:
    book = Codebook(2, 1)
    book.embeddings.copy_(torch.tensor([[0.0], [10.0]]))
    book.z_avg.copy_(torch.tensor([[0.0], [50.0]]))
    book.N.copy_(torch.tensor([4.0, 5.0]))
    z = torch.tensor([1.0, 3.0, 12.0]).view(1, 1, 1, 1, 3)
    codebook.update(book, z, book.nearest(z), torch.Generator())
    counts = torch.tensor([0.99 * 4 + 0.01 * 2, 0.99 * 5 + 0.01 * 1])
    sums = torch.tensor([0.01 * 4, 0.99 * 50 + 0.01 * 12])
    total = counts.sum()
    weights = (counts + 1e-7) / (total + 2 * 1e-7) * total
    assert torch.allclose(book.N, counts)
    assert torch.allclose(book.embeddings[:, 0], sums / weights)


def test_dead_codes_become_latents_of_the_batch_until_the_next_update() -> None:
    book = Codebook(3, 1)
    book.embeddings.copy_(torch.tensor([[0.0], [1.0], [99.0]]))
    book.z_avg.copy_(torch.tensor([[0.0], [5.0], [49.5]]))
    book.N.copy_(torch.tensor([5.0, 5.0, 0.5]))
    z = torch.tensor([0.1, 0.9, 1.1, 0.2]).view(1, 1, 1, 1, 4)
    codebook.update(book, z, book.nearest(z), torch.Generator())
    assert float(book.embeddings[2]) in [pytest.approx(v) for v in (0.1, 0.9, 1.1, 0.2)]
    assert book.N[2] == pytest.approx(0.495)
    assert book.z_avg[2] == pytest.approx(49.5 * 0.99)


def test_a_released_codebook_has_no_latents_of_patients_in_dead_codes() -> None:
    book = Codebook(4, 2)
    book.embeddings.copy_(torch.tensor([[1.0, 2], [3, 4], [70, 71], [80, 81]]))
    book.N.copy_(torch.tensor([5.0, 9.0, 0.5, 0.0]))
    book.z_avg.copy_(book.embeddings * book.N[:, None])
    before = book.embeddings[:2].clone()
    codebook.drop_dead(book)
    assert torch.equal(book.embeddings, torch.cat([before, before[1:], before[1:]]))
    assert torch.equal(book.z_avg, book.embeddings * book.N[:, None])
    book.N.zero_()
    codebook.drop_dead(book)
    assert torch.equal(book.embeddings[:2], before)


def test_perplexity_counts_codes_that_are_used_alike() -> None:
    assert codebook.perplexity(torch.tensor([0, 1, 2, 3]), 16) == pytest.approx(4, rel=1e-4)
    assert codebook.perplexity(torch.tensor([5, 5, 5]), 16) == pytest.approx(1, rel=1e-4)


def test_gradients_pass_the_quantiser() -> None:
    module = Reconstruction(medical_plan().autoencoder)
    output, commitment, z, indices = module(torch.randn(1, 1, 15, 24, 16))
    assert output.shape == (1, 1, 15, 24, 16), "sizes that do not divide are padded and cut back"
    assert not z.requires_grad
    assert indices.shape == (1, 8, 6, 4)
    (gradient,) = torch.autograd.grad(output.sum(), module.vqgan.pre_vq_conv.conv.weight, retain_graph=True)
    assert gradient.abs().sum() > 0
    codes = module.vqgan.codebook.look_up(indices)
    assert commitment.item() == pytest.approx(float((z - codes).square().mean()), rel=1e-5)


# -- discriminators and LPIPS --------------------------------------------------------------------------------


def test_keys_of_discriminators_and_lpips_are_those_of_the_checkpoints() -> None:
    listed = [line.split("\t") for line in KEYS.read_text().splitlines()]
    with torch.device("meta"):
        modules = {"": Discriminators(), "perceptual_model.": LPIPS()}
    own = {p + k: t for p, m in modules.items() for k, t in m.state_dict().items()}
    wanted = {k: (s, d) for k, s, d in listed if k.startswith(("image_d", "video_d", "perceptual"))}
    assert {k: (str(tuple(t.shape)), str(t.dtype)) for k, t in own.items()} == wanted
    counts = [sum(p.numel() for p in PatchDiscriminator(d).parameters()) for d in (2, 3)]
    assert counts == [2764481, 11049665]
    assert sum(p.numel() for p in LPIPS().parameters()) == 14716160


def test_discriminators_judge_the_chosen_slices_and_the_volume() -> None:
    judges = Discriminators(norm="group").eval()
    x = torch.randn(2, 1, 8, 16, 16)
    slices = torch.tensor([1, 6])
    image, video = judges(x, slices)
    assert [f.shape[1] for f in image] == [f.shape[1] for f in video] == [64, 128, 256, 512, 1]
    expected = judges.image_discriminator(torch.stack([x[0, :, 1], x[1, :, 6]]))
    assert torch.equal(image[-1], expected[-1])


def test_adversarial_losses_in_closed_form() -> None:
    def outputs(feature: float, logit: float) -> list[list[Tensor]]:
        return [[torch.full((2, 3), feature), torch.full((2, 1), logit)]] * 2

    real, fake = outputs(1.0, 0.25), outputs(3.0, -0.5)
    assert hinge(real, fake).item() == pytest.approx(2 * 0.5 * (0.75 + 0.5))
    assert hinge(outputs(0, 2), outputs(0, -2)).item() == 0
    assert adversarial(fake).item() == pytest.approx(2 * 0.5)
    assert feature_matching(real, fake).item() == pytest.approx(2 * 2.0), "the logits do not count"


def test_losses_are_float32_under_mixed_precision() -> None:
    """A difference of 255.5 has no place in bfloat16."""

    def outputs(value: float) -> list[list[Tensor]]:
        exact, rounded = torch.full((300,), value), torch.full((300,), 1.0, dtype=torch.bfloat16)
        return [[rounded, exact.bfloat16()]] * 2

    close = [[torch.full((300,), 0.5, dtype=torch.bfloat16), torch.full((300,), 0.0, dtype=torch.bfloat16)]]
    apart = [[torch.full((300,), 256.0).bfloat16(), torch.full((300,), 0.0, dtype=torch.bfloat16)]]
    clean = torch.full((1, 1, 2, 2, 2), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = {
            "hinge": hinge(outputs(0.5), outputs(0.25)),
            "adversarial": adversarial(outputs(-0.5)),
            "features": feature_matching(close, apart),
            "noise": noise_loss(
                lambda x, steps: torch.full(x.shape, 0.3).bfloat16(),
                CosineSchedule(10),
                clean,
                torch.tensor([3]),
                torch.Generator().manual_seed(0),
            ),
        }
    assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, torch.float32)
    assert losses["features"].item() == 255.5


@pytest.mark.parametrize("stage", ["hinge", "adversarial"])
def test_means_of_logits_are_not_rounded(stage: str) -> None:
    """Of 1 and the number before it in bfloat16, which has none between them."""
    logits = [[torch.zeros(1), torch.tensor([1.0, 0.99609375], dtype=torch.bfloat16)]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = adversarial(logits) if stage == "adversarial" else hinge(logits, logits)
    assert abs(loss.item()) == (0.998046875 if stage == "adversarial" else 1.0)


def lpips_files(folder: Path) -> list[Path]:
    """Random weights as a user would have them: torchvision's VGG16, and LPIPS's linear heads."""
    torch.manual_seed(0)
    state = LPIPS().state_dict()
    vgg = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    heads = {k: v.abs() for k, v in state.items() if k.startswith("lin")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2)}, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    return [folder / "vgg16.pth", folder / "vgg.pth"]


def test_lpips_is_the_same_every_time_in_training_too(tmp_path: Path) -> None:
    """The original's is put into training mode with the rest, where its dropout is active."""
    lpips = load_lpips(lpips_files(tmp_path))
    a, b = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    module = torch.nn.ModuleList([lpips]).train()
    first = module[0](a, b)
    assert first.shape == (2,)
    assert torch.equal(first, lpips(a, b))
    assert (first > 0).all()
    assert torch.equal(lpips(a, a), torch.zeros(2))
    black = torch.zeros(1, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(_unit(black).square().sum(), black)
    assert bool(gradient.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(a, b), first), "float32 under mixed precision"
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_of_a_volume_sees_slices_of_all_three_axes() -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            seen.append(a.shape[2:])
            return (a - b).abs().mean(dim=(1, 2, 3))

    x = torch.zeros(2, 1, 4, 6, 8)
    total = three_planes(x, x + 1, Spy(), torch.Generator().manual_seed(0))
    assert seen == [(6, 8), (4, 8), (4, 6)]
    assert total.item() == pytest.approx(3.0)


def test_lpips_weights_come_from_local_files_alone(tmp_path: Path) -> None:
    vgg, _ = lpips_files(tmp_path)
    with pytest.raises(DiffaugError, match=r"vgg16\.pth do not hold the weights of LPIPS.*lin0"):
        load_lpips([vgg])
    with pytest.raises(DiffaugError, match=r"cannot read .*missing\.pth"):
        load_lpips([tmp_path / "missing.pth"])
    (tmp_path / "spoilt.safetensors").write_bytes(b"no")
    with pytest.raises(DiffaugError, match=r"cannot read weights from .*spoilt\.safetensors"):
        load_lpips([tmp_path / "spoilt.safetensors"])


def test_the_weights_of_the_perceptual_loss_are_part_of_the_plan(blobs: Path, tmp_path: Path) -> None:
    files = lpips_files(tmp_path)
    hashes = tuple(sha256_file(file) for file in files)
    plan = medical_plan(steps=1, perceptual=hashes)
    larger = plan.model_copy(update={"grid": GridPlan(spacing=(2.0, 2.0, 2.0), shape=(16, 24, 16))})
    (tmp_path / "plan.json").write_text(larger.model_dump_json())
    data, given = read_dataset(blobs), {"plan": tmp_path / "plan.json", "progress": QUIET}
    with pytest.raises(DiffaugError, match=r"the plan trains with LPIPS.*given are \(none\)"):
        fit_generator(data, tmp_path / "fit", **given)
    fit_generator(data, tmp_path / "fit", perceptual=files, **given)
    history = json.loads((tmp_path / "fit" / "history.json").read_text())
    assert history["autoencoder"][-1]["training_perceptual"] > 0
    assert str(tmp_path) not in (tmp_path / "fit" / "plan.json").read_text()
    with pytest.raises(DiffaugError, match="a perceptual loss is part of medical-diffusion alone"):
        fit_generator(data, tmp_path / "other", perceptual=files, budget=60, dry_run=True, progress=QUIET)


def test_no_constructor_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original downloads LPIPS's weights whenever a VQ-GAN is made, for inference too."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a constructor opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    plan = medical_plan()
    Reconstruction(plan.autoencoder)
    Discriminators()
    with torch.device("meta"):
        LPIPS()


# -- trainer -------------------------------------------------------------------------------------------------


class FixedBatches:
    """Two volumes, whatever the step."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.volumes = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def __call__(self, step: int) -> tuple[object, object]:
        return self.volumes.numpy(), None


def trainer(plan: MedicalDiffusionPlan, lpips: LPIPS | None = None) -> VQGANTrainer:
    batches = FixedBatches(plan.grid.shape)
    return VQGANTrainer(plan, batches, [batches.volumes[:1]], make_accelerator("cpu"), None, lpips)


def test_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    plan = medical_plan(steps=4, discriminator_start=1)
    through = trainer(plan)
    for step in range(4):
        losses = through.step(step)
    assert {"reconstruction", "commitment", "adversarial", "features", "discriminators"} <= losses.keys()
    stopped = trainer(plan)
    for step in range(2):
        stopped.step(step)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = trainer(plan)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        resumed.step(step)
    for name in ("module", "discriminators"):
        expected, found = through.state_dict()[name], resumed.state_dict()[name]
        other = {k: float((found[k].float() - v.float()).abs().max()) for k, v in expected.items()}
        assert not {k: difference for k, difference in other.items() if difference != 0}


def test_discriminators_take_part_from_their_step_on() -> None:
    run = trainer(medical_plan(steps=3, discriminator_start=2))
    before = {k: v.clone() for k, v in run.discriminators.state_dict().items()}
    assert "adversarial" not in run.step(0) | run.step(1)
    assert all(torch.equal(before[k], v) for k, v in run.discriminators.state_dict().items())
    assert "adversarial" in run.step(2)
    assert not all(torch.equal(before[k], v) for k, v in run.discriminators.state_dict().items())


def test_the_perceptual_loss_is_part_of_training_where_weights_are_given(tmp_path: Path) -> None:
    larger = GridPlan(spacing=(2.0, 2.0, 2.0), shape=(16, 24, 16))
    plan = medical_plan(steps=1).model_copy(update={"grid": larger})
    losses = trainer(plan, load_lpips(lpips_files(tmp_path))).step(0)
    assert losses["perceptual"] > 0
    expected = (
        4 * losses["reconstruction"]
        + 0.25 * losses["commitment"]
        + 4 * losses["perceptual"]
        + losses["adversarial"]
        + 4 * losses["features"]
    )
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_lowers_the_reconstruction_loss() -> None:
    run = trainer(medical_plan(steps=60, discriminator_start=60))
    before = run.evaluate()["loss"]
    for step in range(60):
        run.step(step)
    figures = run.evaluate()
    assert figures["loss"] < 0.8 * before
    assert 0 <= figures["clipped"] < 0.2
    assert 1 <= figures["perplexity"] <= 32
    assert 0 < figures["live_codes"] <= 1


# -- plan ----------------------------------------------------------------------------------------------------


def test_factors_are_the_published_ones() -> None:
    assert plan_factor((40, 56, 40)) == plan_factor((64, 64, 64)) == 2
    assert plan_factor((32, 256, 256)) == plan_factor((128, 128, 128)) == 4
    assert plan_factor((256, 256, 128)) == 8
    with pytest.raises(DiffaugError, match="512 x 512 x 512 voxels"):
        plan_factor((512, 512, 512))


def test_depth_is_the_coarsest_axis_or_the_one_that_wastes_least() -> None:
    assert plan_axes(GridPlan(spacing=(1, 1, 3), shape=(64, 64, 32)), 2, 8)[0] == 2
    assert plan_axes(GridPlan(spacing=(4, 1, 1), shape=(32, 64, 64)), 2, 8) == (0, 1, 2)
    # 40 x 56 x 40 at a factor of 2 is 20 x 28 x 20: 28 pads to 32, 20 to 24.
    assert plan_axes(GridPlan(spacing=(1, 1, 1), shape=(40, 56, 40)), 2, 8) == (2, 0, 1)


def test_codebooks_are_as_large_as_a_batch_keeps_alive() -> None:
    assert plan_codes(22400) == 2048
    assert plan_codes(10**6) == 16384
    assert plan_codes(10) == 16


@pytest.mark.parametrize("warm", [False, True], ids=["from nothing", "from a generator"])
def test_the_planner_as_it_is(fitted: Path, blobs: Path, tmp_path: Path, warm: bool) -> None:
    start = ["--init", str(fitted)] if warm else ["--architecture", "medical-diffusion"]
    done = subprocess.run(
        command(blobs, tmp_path / "fit", "--budget", "10m", "--dry-run", *start),
        check=True,
        capture_output=True,
        text=True,
    )
    plan = MedicalDiffusionPlan.model_validate_json(done.stdout)
    assert not plan.problems()
    assert plan.autoencoder_training.steps > plan.autoencoder_training.discriminator_start > 0
    assert plan.denoiser_training.steps > 10
    assert plan.augmentation.mirror_axes == ()
    if warm:
        start_card = Generator.load(fitted).card
        assert plan.autoencoder == start_card.networks.autoencoder
        assert plan.diffusion_steps == start_card.networks.steps
        assert plan.init == Generator.load(fitted).weights_hash
    else:
        assert (plan.diffusion_steps, plan.denoiser.dim) == (300, 32)
        assert all(n % 8 == 0 for n in plan.grid.shape)


def test_volumes_that_would_not_fit_get_a_coarser_grid() -> None:
    """A whole head of 1 mm: by memory, then by the largest published latent; flat voxels stay as they are."""
    head = Fingerprint(
        cases=10,
        labelled_cases=0,
        spacing_median=[1.0, 1.0, 1.0],
        shape_median=[176, 240, 256],
        shape_largest=[176, 240, 256],
        label_box_largest_mm=None,
        label_volumes_mm3={},
        intensity_low=[0.0],
        intensity_high=[900.0],
        intensity_min=[0.0],
        intensity_max=[2300.0],
    )
    small = fitting_grid(head, 20e9)
    assert np.prod(small.shape) * 4500 <= 10e9
    assert len(set(small.spacing)) == 1
    assert 1.5 < small.spacing[0] < 2.1
    assert all(n * s >= 170 for n, s in zip(small.shape, small.spacing, strict=True))
    assert plan_batch(small, 20e9, 1) >= 1
    assert fitting_grid(head, 1e12).shape == (176, 240, 256)
    chest = head.model_copy(update={"shape_median": [512, 512, 150], "spacing_median": [0.7, 0.7, 2.5]})
    plan = fitting_grid(chest, 1e12)
    assert plan_factor(plan.shape) == 8
    assert plan.spacing[2] == 2.5
    assert plan.spacing[0] == plan.spacing[1] > 0.7


def test_a_budget_or_memory_that_no_fit_fits_is_refused(blobs: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match=r"a budget of 0 s is too small .* autoencoder .* denoiser"):
        fit_generator(
            read_dataset(blobs),
            tmp_path,
            architecture="medical-diffusion",
            budget=0.01,
            dry_run=True,
            progress=QUIET,
        )
    grid = GridPlan(spacing=(1, 1, 1), shape=(128, 128, 128))
    assert plan_batch(grid, 64e9, 1) == 2
    assert plan_batch(grid, 20e9, 1) == plan_batch(grid, 10e9, 1) == 1
    assert plan_batch(grid, 64e9, 3) == 3
    with pytest.raises(DiffaugError, match="one volume of 128 x 128 x 128 voxels takes about 9 GB, and 8 GB"):
        plan_batch(grid, 8e9, 1)


def test_an_edited_grid_has_to_fit_into_memory_too(blobs: Path, plan_file: Path, tmp_path: Path) -> None:
    plan = json.loads(plan_file.read_text())
    plan["grid"]["shape"] = [1024, 1024, 1024]
    large = tmp_path / "large.json"
    large.write_text(json.dumps(plan))
    with pytest.raises(DiffaugError, match="one volume of 1024 x 1024 x 1024 voxels takes about 4832 GB"):
        fit_generator(read_dataset(blobs), tmp_path / "fit", plan=large, dry_run=True, progress=QUIET)


@pytest.mark.parametrize(("loss", "warned"), [(0.12, False), (0.67, True)])
def test_a_denoiser_that_makes_noise_is_called_so(
    loss: float, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _tell({"noise_loss": loss}, Progress())
    assert ("learned next to nothing" in capsys.readouterr().err) == warned


# -- the whole fit -------------------------------------------------------------------------------------------


def test_a_fit_makes_a_generator_with_all_that_was_promised(fitted: Path) -> None:
    generator = Generator.load(fitted)
    assert generator.card.architecture == "medical-diffusion"
    assert generator.verbs == {"sample", "vary", "inpaint", "encode", "decode"}
    assert generator.sample(1, steps=2).image.shape == (1, 1, 15, 24, 16)
    assert {"reconstruction_psnr_db", "live_codes", "clipped_latents", "noise_loss"} <= set(
        generator.card.figures
    )
    for name in ("montage.png", "curves.png", "private/montage.png"):
        assert (fitted / name).read_bytes().startswith(b"\x89PNG")
    assert read_plan(fitted / "plan.json") == MedicalDiffusionPlan.model_validate(generator.plan)
    low, high = generator.card.networks.latent_range
    assert (low, high) == generator.model.autoencoder.codebook.range(live_only=True)
    assert bool(generator.model.autoencoder.codebook.initialised)


def test_checkpoints_hold_the_optimizers(fitted: Path) -> None:
    for name, keys in (
        ("autoencoder.pt", {"optimizer", "discriminator_optimizer", "discriminators", "module"}),
        ("denoiser.pt", {"optimizer", "module", "average"}),
    ):
        state = torch.load(fitted / "private" / name, weights_only=True)
        assert keys <= state.keys()
        assert len(state["optimizer"]["state"]) > 0
        assert state["step"] == 6


def test_validation_cases_are_not_trained_on(
    blobs: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole patients are held out, and what both stages draw from is the others."""
    table = tmp_path / "patients.csv"
    names = [case.name for case in read_dataset(blobs).cases]
    table.write_text("case,patient\n" + "".join(f"{name},{n // 2}\n" for n, name in enumerate(names)))
    trained_on: list[tuple[str, ...]] = []
    evaluated_on: list[tuple[str, ...]] = []
    stages = "diffaug.training.medical_diffusion.training"
    for name, real in (("train_autoencoder", train_autoencoder), ("train_denoiser", train_denoiser)):

        def spy(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            first, second = (a for a in args if isinstance(a, Canvases))
            trained_on.append(first.names)
            evaluated_on.append(second.names)
            return real(*args, **kwargs)

        monkeypatch.setattr(f"{stages}.{name}", spy)
    dataset = read_dataset(blobs, patients=table)
    output = tmp_path / "fit"
    fit_generator(dataset, output, plan=plan_file, progress=QUIET)
    assert trained_on[0] == trained_on[1]
    assert evaluated_on[0] == evaluated_on[1]
    patients = {case.name: case.patient for case in dataset.cases}
    fitted_patients, held_out = (
        {patients[name] for name in found[0]} for found in (trained_on, evaluated_on)
    )
    assert fitted_patients | held_out == set(patients.values())
    assert not fitted_patients & held_out
    canvases = np.load(output / "private" / "training" / "images.npy")
    assert len(canvases) == len(trained_on[0])
    sidecar = json.loads((output / "private" / "training_scans.json").read_text())
    assert set(sidecar["scans"]) == set(trained_on[0])


def test_start_from_another_fit_keeps_its_autoencoder(fitted: Path, blobs: Path, tmp_path: Path) -> None:
    plan = medical_plan(steps=2)
    kept = plan.autoencoder_training.model_copy(update={"steps": 0})
    (tmp_path / "plan.json").write_text(
        plan.model_copy(update={"autoencoder_training": kept}).model_dump_json()
    )
    fit_generator(
        read_dataset(blobs), tmp_path / "warm", plan=tmp_path / "plan.json", init=fitted, progress=QUIET
    )
    old, new = (load_file(f / "autoencoder.safetensors") for f in (fitted, tmp_path / "warm"))
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert Generator.load(tmp_path / "warm").card.training.init == Generator.load(fitted).weights_hash


def test_a_schedule_of_another_length_is_no_start(fitted: Path, blobs: Path, tmp_path: Path) -> None:
    other = medical_plan().model_copy(update={"diffusion_steps": 10})
    (tmp_path / "plan.json").write_text(other.model_dump_json())
    with pytest.raises(DiffaugError, match="its diffusion_steps is of another size than the plan's"):
        fit_generator(
            read_dataset(blobs), tmp_path / "a", plan=tmp_path / "plan.json", init=fitted, progress=QUIET
        )


def test_architectures_do_not_mix(fitted: Path, blobs: Path, plan_file: Path, tmp_path: Path) -> None:
    data = read_dataset(blobs)
    with pytest.raises(DiffaugError, match="cannot start from hippocampus-mr: it is a joint-flow generator"):
        fit_generator(data, tmp_path / "a", plan=plan_file, init="hippocampus-mr", progress=QUIET)
    with pytest.raises(
        DiffaugError, match="architecture: 'medical-diffusion' in the plan, 'joint-flow' given"
    ):
        fit_generator(data, fitted, architecture="joint-flow", progress=QUIET)


def test_a_plan_that_does_not_fit_together_is_refused(blobs: Path, tmp_path: Path) -> None:
    plan = medical_plan()
    for update, message in (
        ({"denoiser": UNetConfig(dim=8)}, "must be autoencoder.latent_channels, 4"),
        ({"axes": (0, 0, 1)}, "axes must name each"),
        (
            {"autoencoder_training": AutoencoderTraining(steps=1, discriminator_start=0, perceptual=("a",))},
            "LPIPS needs slices of at least 16 x 16",
        ),
        ({"labels": {0: "background"}}, "medical-diffusion with this dataset needs {}"),
    ):
        (tmp_path / "plan.json").write_text(plan.model_copy(update=update).model_dump_json())
        with pytest.raises(DiffaugError, match=message):
            fit_generator(read_dataset(blobs), tmp_path / "f", plan=tmp_path / "plan.json", progress=QUIET)
    assert not (tmp_path / "f").exists()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_weights(
    blobs: Path, plan_file: Path, tmp_path: Path
) -> None:
    """SIGKILL in every stage; the weights, codebook included, equal those of an uninterrupted run."""
    whole, output = tmp_path / "whole", tmp_path / "interrupted"
    subprocess.run(command(blobs, whole, "--plan", str(plan_file)), check=True, stderr=subprocess.DEVNULL)
    stages = ("training/images.npy", "autoencoder.pt", "latents/round_000.safetensors", "denoiser.pt")
    killed = 0
    for stage in stages:
        process = subprocess.Popen(
            command(blobs, output, "--plan", str(plan_file)), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (output / "private" / stage).exists():
            time.sleep(0.002)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed == len(stages)
    subprocess.run(command(blobs, output, "--plan", str(plan_file)), check=True, stderr=subprocess.DEVNULL)
    for name in ("autoencoder.safetensors", "denoiser.safetensors"):
        uninterrupted, resumed = (load_file(f / name) for f in (whole, output))
        assert all(torch.equal(uninterrupted[k], resumed[k]) for k in uninterrupted)


@pytest.mark.slow
def test_two_processes_fit_one_generator(blobs: Path, plan_file: Path, tmp_path: Path) -> None:
    """The first process plans, reads and checks for both."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, options in (("given", ["--plan", str(plan_file)]), ("joint", ["--budget", "20s"])):
        fit = command(blobs, tmp_path / name, "--device", "cpu", *options)
        done = subprocess.run([*launch, *fit[1:]], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert bool(Generator.load(tmp_path / name).sample(1, steps=2).image.isfinite().all())
    odd = medical_plan(batch=3)
    (tmp_path / "odd.json").write_text(odd.model_dump_json())
    fit = command(blobs, tmp_path / "odd", "--device", "cpu", "--plan", str(tmp_path / "odd.json"))
    done = subprocess.run([*launch, *fit[1:]], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "autoencoder_training.batch is 3, which 2 processes cannot share evenly" in done.stderr
