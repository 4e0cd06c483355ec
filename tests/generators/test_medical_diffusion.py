"""Medical Diffusion as a Generator: the latent scale, all samplers, SDEdit, both ways to inpaint."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from diffaug.errors import CardError, DiffaugError, LabelError, VerbError
from diffaug.generators.diffusion import CosineSchedule
from diffaug.generators.generator import Generator
from diffaug.generators.hardware import exact_float32
from diffaug.generators.intensity import fit_intensity_map
from diffaug.generators.medical_diffusion.model import scale, unscale
from diffaug.generators.model import Sampling
from diffaug.generators.seeds import CaseNoise
from tests.conftest import MEDICAL_GRID as GRID

Make = Callable[..., Generator]
AFFINE = np.diag([2.0, 2, 2, 1])


def volumes(count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(count, 1, *GRID, generator=generator) * 1000).round()


def cuboid() -> torch.Tensor:
    mask = torch.zeros(1, 1, *GRID, dtype=torch.bool)
    mask[:, :, 4:9, 6:12, 3:8] = True
    return mask


def test_the_latent_scale_takes_the_range_to_one() -> None:
    z = torch.tensor([-2.0, 0.25, 2.5, 5.0])
    assert scale(z, (-2.0, 2.5)).tolist() == pytest.approx([-1, 0, 1, 2.1111], abs=1e-4)
    assert torch.allclose(unscale(scale(z, (-2.0, 2.5)), (-2.0, 2.5)), z)


def test_encode_and_decode_are_the_networks_with_depth_first(medical_generator: Make) -> None:
    generator = medical_generator()
    image = volumes()
    z = generator.encode(image, AFFINE)
    # The grid is 14 x 20 x 12; depth is its third axis and halved, height its first and quartered.
    assert z.shape == (1, 3, 6, 4, 10)
    low, high = float(image.min()), float(image.max())
    network = ((image - low) / (high - low) * 2 - 1).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        expected = scale(generator.model.autoencoder.encode(network), (-2.0, 2.5))
        assert torch.allclose(z, expected, atol=1e-4)
        decoded = generator.model.autoencoder.decode(unscale(z, (-2.0, 2.5)), (12, 14, 20))
    made = generator.decode(z)
    assert made.shape == (1, 1, *GRID)
    assert torch.allclose(made, (decoded.permute(0, 1, 3, 4, 2).clamp(-1, 1) + 1) * 500, atol=0.1)


@pytest.mark.parametrize(
    ("sampler", "steps"), [("ancestral", None), ("ancestral", 5), ("ddim", None), ("dpm-solver++", 4)]
)
def test_every_sampler_makes_the_same_case_from_a_seed(
    medical_generator: Make, sampler: str, steps: int | None
) -> None:
    generator = medical_generator()
    first = generator.sample(2, seed=[3, 4], sampler=sampler, steps=steps)
    assert first.image.shape == (2, 1, *GRID)
    assert bool(torch.isfinite(first.image).all())
    assert not first.label.any()
    again = generator.sample(1, seed=[4], sampler=sampler, steps=steps)
    assert torch.equal(again.image[0], first.image[1])
    assert not torch.equal(first.image[0], first.image[1])


def test_a_whole_ancestral_run_is_ddpm(medical_generator: Make) -> None:
    """Twelve steps with the authors' float32 tables, each with the next noise of the case's stream."""
    model = medical_generator().model
    tables = CosineSchedule(12).buffers()
    stream = CaseNoise([7])
    with torch.no_grad():
        x = stream.draw(model.image_latent)
        for step in reversed(range(12)):
            noise = model.denoiser(x, torch.tensor([step]))
            estimate = (
                tables["sqrt_recip_alphas_cumprod"][step] * x
                - tables["sqrt_recipm1_alphas_cumprod"][step] * noise
            ).clamp(-1, 1)
            x = tables["posterior_mean_coef1"][step] * estimate + tables["posterior_mean_coef2"][step] * x
            if step:
                deviation = (0.5 * tables["posterior_log_variance_clipped"][step]).exp()
                x = x + deviation * stream.draw(model.image_latent)
        found, label = model.sample(CaseNoise([7]), Sampling("ancestral", steps=12))
    assert label.shape[1] == 0
    assert (found - x).norm() / x.norm() < 1e-5


def test_samplers_of_another_architecture_and_too_many_steps_are_refused(medical_generator: Make) -> None:
    generator = medical_generator()
    with pytest.raises(DiffaugError, match=r"no sampler 'euler'; it has ancestral, ddim, dpm-solver\+\+"):
        generator.sample(1, sampler="euler")
    with pytest.raises(DiffaugError, match="at least 1 and at most 12, got 13"):
        generator.sample(1, steps=13)
    with pytest.raises(DiffaugError, match="knows no labels that could guide"):
        generator.sample(1, guidance=2.0)


def test_vary_moves_more_with_strength_and_nothing_at_zero(medical_generator: Make) -> None:
    generator = medical_generator()
    image = volumes()
    assert torch.equal(generator.vary(image, None, AFFINE, strength=0.0), image)
    moved = [
        float((generator.vary(image, None, AFFINE, strength=s, seed=2) - image).abs().mean())
        for s in (0.1, 0.5, 1.0)
    ]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_vary_adds_no_more_than_clipped_volumes_differ_by(medical_generator: Make) -> None:
    generator = medical_generator()
    last = generator.model.autoencoder.decoder.conv_last.conv
    with torch.no_grad():
        last.weight.mul_(1000)
    image = volumes()
    varied = generator.vary(image, None, AFFINE, strength=0.9, seed=1)
    range_of_two = fit_intensity_map(image[0], generator.card.intensity)
    most = generator.card.intensity.clip * (range_of_two.high - range_of_two.low)
    change = (varied - image).abs().max()
    assert 0.5 * most < change <= 1.001 * most


def test_vary_promises_no_label_unless_told_that_it_may_drift(medical_generator: Make) -> None:
    generator = medical_generator()
    image, label = volumes(), cuboid().to(torch.uint8)
    with pytest.raises(LabelError, match="knows no labels and cannot preserve one"):
        generator.vary(image, label, AFFINE)
    varied = generator.vary(image, label, AFFINE, allow_label_drift=True, seed=1)
    assert torch.equal(varied, generator.vary(image, None, AFFINE, seed=1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm-solver++"])
def test_inpainting_changes_the_mask_alone(medical_generator: Make, masked: bool, sampler: str) -> None:
    generator = medical_generator(masked)
    image, mask = volumes(), cuboid()
    made = generator.inpaint(image, mask, None, AFFINE, sampler=sampler, seed=3)
    assert torch.equal(made[~mask], image[~mask])
    assert not torch.equal(made[mask], image[mask])


def test_a_masked_denoiser_sees_the_masked_image_and_the_mask(medical_generator: Make) -> None:
    generator = medical_generator(masked=True)
    seen = []
    generator.model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image, mask = volumes(), cuboid()
    generator.inpaint(image, mask, None, AFFINE, steps=1)
    latent, region = seen[0][:, 3:6], seen[0][:, 6]
    assert set(region.unique().tolist()) == {-1.0, 1.0}
    # Nearest neighbour: the first voxel of each code's block, in the networks' axes.
    assert torch.equal(region[0] > 0, mask[0, 0].permute(2, 0, 1)[::2, ::4, ::2])
    low, high = float(image.min()), float(image.max())
    network = (image - low) / (high - low) * 2 - 1
    erased = torch.where(mask, 0.0, network)
    assert torch.allclose(latent, generator.model.encode_image(erased), atol=1e-4)
    # What lies below the mask does not reach the networks.
    other = image.clone()
    other[mask] = 500
    generator.inpaint(other, mask, None, AFFINE, steps=1)
    assert torch.equal(seen[1], seen[0])


def test_a_model_says_which_verbs_its_networks_lack(medical_generator: Make) -> None:
    model = medical_generator().model
    latent, noise = torch.zeros(1, *model.image_latent), CaseNoise([0])
    for verb in (model.paint, model.segment):
        with pytest.raises(VerbError, match=f"networks of MedicalDiffusion cannot {verb.__name__}"):
            verb(latent, noise, Sampling("ddim", 2))


def test_a_masked_denoiser_only_inpaints(medical_generator: Make) -> None:
    generator = medical_generator(masked=True)
    assert generator.verbs == {"inpaint", "encode", "decode"}
    with pytest.raises(VerbError, match="has no verb 'sample'"):
        generator.sample(1)


def test_without_clipping_ddim_avoids_the_last_step(medical_generator: Make) -> None:
    generator = medical_generator(masked=True, clip=False)
    steps = []
    generator.model.denoiser.register_forward_pre_hook(lambda _, inputs: steps.append(int(inputs[1][0])))
    generator.inpaint(volumes(), cuboid(), None, AFFINE, sampler="ddim", steps=3)
    assert steps == [10, 6, 1]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_vary_takes_up_the_trajectory_where_it_was_noised_to(
    medical_generator: Make, clip: bool, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = medical_generator(clip=clip)
    called, noised = [], []
    generator.model.denoiser.register_forward_pre_hook(lambda _, inputs: called.append(int(inputs[1][0])))
    add_noise = CosineSchedule.add_noise
    monkeypatch.setattr(
        CosineSchedule, "add_noise", lambda s, c, n, step: noised.append(step) or add_noise(s, c, n, step)
    )
    generator.vary(volumes(), None, AFFINE, strength=strength, sampler="ddim", steps=5)
    assert noised == called[:1]


@pytest.mark.parametrize("clip", [False, True])
def test_inpainting_ends_at_the_clean_latent_outside_the_mask(medical_generator: Make, clip: bool) -> None:
    model = medical_generator(clip=clip).model
    image = torch.rand(1, 1, *GRID, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mask = torch.zeros(1, 1, *GRID)
    mask[:, :, :4, :4, :4] = 1
    with torch.no_grad():
        made = model.inpaint(image, mask, torch.zeros(1, 0), CaseNoise([1]), Sampling("ddim", steps=4))
        clean = model.encode_image(image)
    assert torch.equal(made[..., -3:], clean[..., -3:])
    assert not torch.equal(made[..., :1], clean[..., :1])


def test_without_clipping_there_is_no_ancestral_sampling(medical_generator: Make) -> None:
    """It begins at the last step, where the noise prediction's error counts 19000 times."""
    generator = medical_generator(clip=False)
    with pytest.raises(DiffaugError, match=r"has no sampler 'ancestral'; it has ddim, dpm-solver\+\+"):
        generator.sample(1, sampler="ancestral")
    assert float(generator.sample(1, sampler="dpm-solver++", steps=5).image.abs().max()) < 1e6


@torch.no_grad()
def test_mixed_precision_casts_weights_once_a_trajectory(
    medical_generator: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffaug.generators.medical_diffusion.model.has_bfloat16", lambda device: True)
    generator = medical_generator(bfloat16=True)
    casts = []
    weight = generator.model.denoiser.time_mlp[1].weight

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_to_copy" and args[0].data_ptr() == weight.data_ptr():
                casts.append(func)
            return func(*args, **(kwargs or {}))

    with Casts():
        generator.sample(1, sampler="ddim", steps=6)
    assert len(casts) == 1
    assert not any(parameter.requires_grad for parameter in generator.model.parameters())


def test_products_are_exact_whatever_the_process_asked_for(medical_generator: Make) -> None:
    before = torch.get_float32_matmul_precision()
    seen = set()
    generator = medical_generator()
    for network in (generator.model.denoiser, generator.model.autoencoder.decoder):
        network.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    try:
        torch.set_float32_matmul_precision("high")
        generator.sample(1, steps=2)
        assert torch.get_float32_matmul_precision() == "high"
        with exact_float32(), ThreadPoolExecutor(1) as other:
            other.submit(generator.sample, 1, steps=1).result()
            assert torch.get_float32_matmul_precision() == "highest", "the last one out restores"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"highest"}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_only_networks_trained_in_mixed_precision_are_used_so(
    medical_generator: Make, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffaug.generators.medical_diffusion.model.has_bfloat16", lambda device: True)
    generator = medical_generator(bfloat16=bfloat16)
    dtypes, tf32 = set(), set()
    generator.model.denoiser.register_forward_hook(lambda *_: tf32.add(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for network in (generator.model.denoiser, generator.model.autoencoder):
        for module in network.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    sample = generator.sample(1, steps=2)
    assert dtypes == {torch.bfloat16 if bfloat16 else torch.float32}
    assert sample.image.dtype == torch.float32
    assert tf32 == {bfloat16}, "float32 is no TF32"
    assert torch.backends.cudnn.allow_tf32


def test_saved_and_loaded_it_makes_the_same_bytes(medical_generator: Make, tmp_path: Path) -> None:
    generator = medical_generator()
    before = generator.sample(1, seed=5).image
    generator.save(tmp_path)
    assert sorted(generator.card.files) == ["autoencoder.safetensors", "denoiser.safetensors"]
    loaded = Generator.load(tmp_path)
    assert torch.equal(loaded.sample(1, seed=5).image, before)
    (tmp_path / "denoiser.safetensors").unlink()
    with pytest.raises(CardError, match=r"denoiser\.safetensors is missing"):
        Generator.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": (0, 0, 1)}, "each of 0, 1 and 2 once"),
        ({"latent_range": (1.0, 1.0)}, "low < high"),
        ({"denoiser": {"channels": 5, "out_channels": 3, "dim": 8}}, "it must map 3, or 7"),
    ],
)
def test_networks_that_do_not_fit_together_are_refused(
    medical_generator: Make, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        medical_generator(**changes)


def test_a_card_names_verbs_samplers_and_steps_that_its_networks_have(medical_generator: Make) -> None:
    card = medical_generator().card
    for update, message in (
        ({"verbs": ["paint"]}, "these networks cannot paint"),
        ({"defaults": {"sampler": "euler"}}, "these networks have ancestral, ddim"),
        ({"defaults": {"sampler": "ddim", "steps": 50}}, "the schedule has 12"),
        ({"architecture": "joint-flow"}, "the networks are those of medical-diffusion"),
    ):
        with pytest.raises(ValidationError, match=message):
            type(card).model_validate(card.model_dump() | update)
