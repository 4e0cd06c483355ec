"""Checkpoints of Medical Diffusion and DiffTumor: into a generator, and back."""

import os
import pickle
import sys
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from diffaug.cli import app
from diffaug.errors import CardError, DiffaugError
from diffaug.files import sha256_file
from diffaug.generators.generator import Generator
from diffaug.generators.medical_diffusion.factorised_unet import FactorisedUNet, UNetConfig
from diffaug.generators.medical_diffusion.model import scale
from diffaug.generators.medical_diffusion.vqgan import VQGAN, VQGANConfig, parameter_count
from diffaug.zoo.folders import new_folder
from diffaug.zoo.medical_diffusion import Choices, export_medical_diffusion, import_medical_diffusion
from diffaug.zoo.medical_diffusion.choices import percentiles, window
from diffaug.zoo.medical_diffusion.reading import TRAINING_ONLY
from diffaug.zoo.unpickling import read_checkpoint
from tests.zoo.upstream import (
    State,
    diffusion_state,
    fill,
    key_list,
    model_configuration,
    schedule,
    unet_shapes,
    vqgan_shapes,
    vqgan_state,
    write_ckpt,
    write_pt,
)

SHAPE = (16, 16, 8)
GRID = Choices(shape=SHAPE, spacing=(1.0, 1.0, 2.0), intensity=percentiles(0, 100, [(0.0, 1000.0)]))
SAID = Choices(downsampling=(2, 2, 2), groups=4, padding="replicate").over(GRID)
LATENT = 4


@pytest.fixture(scope="module")
def vqgan() -> State:
    return vqgan_state()


@pytest.fixture(scope="module")
def diffusion(vqgan: State) -> State:
    return diffusion_state(vqgan)


@pytest.fixture(scope="module")
def ckpt(vqgan: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ckpt(tmp_path_factory.mktemp("ckpt") / "vqgan.ckpt", vqgan)


@pytest.fixture(scope="module")
def pt(vqgan: State, diffusion: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = diffusion_state(vqgan, seed=2)
    return write_pt(tmp_path_factory.mktemp("pt") / "model-78.pt", diffusion, other)


@pytest.fixture(scope="module")
def imported(ckpt: Path, pt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "knee"
    import_medical_diffusion(pt, folder, autoencoder=ckpt, choices=GRID)
    return folder


def changed(state: State, **tensors: Tensor | None) -> State:
    """A copy with other tensors; None leaves one out. `__` stands for a dot."""
    renamed = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return OrderedDict({k: v for k, v in (dict(state) | renamed).items() if v is not None})


# -- the layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "factor", "stages"), [("vqgan-222", 2, 1), ("vqgan-444", 4, 2)])
def test_the_vqgan_has_the_tensors_of_real_checkpoints(name: str, factor: int, stages: int) -> None:
    expected = [row for row in key_list(name) if not row[0].startswith(TRAINING_ONLY)]
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(downsampling=(factor,) * 3))
    found = [(key, tuple(t.shape), str(t.dtype)) for key, t in model.state_dict().items()]
    found.remove(("codebook.initialised", (), "torch.bool"))
    assert found == expected
    shapes = vqgan_shapes(hidden=16, stages=stages, latent=8, codes=16384)
    assert list(shapes.items()) == [row[:2] for row in expected]


def test_the_denoiser_has_the_tensors_of_real_checkpoints() -> None:
    rows = key_list("ddpm-dim32")
    expected = [row for row in rows if row[0].startswith("denoise_fn.")]
    with torch.device("meta"):
        model = FactorisedUNet(UNetConfig())
    found = [(f"denoise_fn.{k}", tuple(t.shape), str(t.dtype)) for k, t in model.state_dict().items()]
    assert found == expected
    shapes = unet_shapes(dim=32, mults=(1, 2, 4, 8), channels=8, out=8, heads=8)
    assert [(f"denoise_fn.{k}", shape) for k, shape in shapes.items()] == [row[:2] for row in expected]
    assert [row[0] for row in rows[:12]] == list(schedule(300))
    assert [(k.removeprefix("vqgan."), s, t) for k, s, t in rows[12 + len(expected) :]] == key_list(
        "vqgan-222"
    )


@pytest.mark.parametrize(("factor", "count"), [(2, 266_825), (4, 1_391_081), (8, 5_884_201)])
def test_vqgan_parameters(factor: int, count: int) -> None:
    with torch.device("meta"):
        assert parameter_count(VQGAN(VQGANConfig(downsampling=(factor,) * 3))) == count


@pytest.mark.parametrize(("dim", "count"), [(16, 3_019_944), (32, 9_981_512), (64, 35_730_312)])
def test_denoiser_parameters(dim: int, count: int) -> None:
    with torch.device("meta"):
        assert parameter_count(FactorisedUNet(UNetConfig(dim=dim))) == count


# -- in ------------------------------------------------------------------------------------------------------


def test_an_import_has_the_files_weights_and_nothing_else(
    imported: Path, vqgan: State, diffusion: State
) -> None:
    assert sorted(file.name for file in imported.iterdir()) == [
        "autoencoder.safetensors",
        "card.json",
        "denoiser.safetensors",
        "plan.json",
    ]
    autoencoder = load_file(imported / "autoencoder.safetensors")
    assert autoencoder.pop("codebook.initialised")
    expected = {key: t for key, t in vqgan.items() if not key.startswith(TRAINING_ONLY)}
    assert autoencoder.keys() == expected.keys()
    assert all(torch.equal(autoencoder[key], tensor) for key, tensor in expected.items())
    denoiser = load_file(imported / "denoiser.safetensors")
    expected = {k.removeprefix("denoise_fn."): t for k, t in diffusion.items() if k.startswith("denoise_fn.")}
    assert denoiser.keys() == expected.keys()
    assert all(torch.equal(denoiser[key], tensor) for key, tensor in expected.items())


def test_the_card_of_an_import(imported: Path, vqgan: State) -> None:
    card = Generator.load(imported).card
    codes = vqgan["codebook.embeddings"]
    assert card.name == "knee"
    assert card.networks.model_dump() == {
        "autoencoder": {
            "channels": 1,
            "hidden": 4,
            "downsampling": (2, 2, 2),
            "latent_channels": LATENT,
            "codes": 64,
            "groups": 4,
            "padding": "replicate",
        },
        "denoiser": {
            "channels": LATENT,
            "out_channels": LATENT,
            "dim": 8,
            "dim_mults": (1, 2),
            "heads": 2,
            "head_dim": 32,
            "kernel": 7,
            "groups": 8,
        },
        "shape": SHAPE,
        "axes": (2, 0, 1),
        "steps": 4,
        # The largest number is that of a code which training no longer used.
        "latent_range": (float(codes.min()), 2.5),
        "clip": True,
        "bfloat16": False,
    }
    assert card.verbs == ["sample", "vary", "inpaint", "encode", "decode"]
    assert (card.defaults.sampler, card.defaults.steps) == ("ancestral", 4)
    assert card.grid.model_dump() == {
        "orientation": ("R", "A", "S"),
        "spacing": (1.0, 1.0, 2.0),
        "shape": SHAPE,
        "outside": "mirror",
    }
    assert (card.channels, card.extent, card.labels) == (["MR"], "object", {})
    # Lightning counts both optimisers.
    assert (card.training.autoencoder_steps, card.training.denoiser_steps) == (57000, 78000)
    assert card.training.dataset == "MRNet"
    assert card.licence.startswith("unknown")
    assert "/home" not in card.model_dump_json()


def test_every_verb_of_an_import_runs(imported: Path) -> None:
    generator = Generator.load(imported)
    image, _, affine = generator.sample(1, seed=3)
    assert image.shape == (1, 1, *SHAPE)
    assert bool(image.isfinite().all())
    assert image.std() > 1
    assert generator.decode(generator.encode(image, affine)).shape == image.shape
    varied = generator.vary(image, None, affine, strength=0.5, allow_label_drift=True)
    assert not torch.equal(varied, image)
    mask = torch.zeros_like(image)
    mask[..., 5:11, 5:11, 2:6] = 1
    painted = generator.inpaint(image, mask, None, affine, allow_label_drift=True)
    assert torch.equal(painted[mask == 0], image[mask == 0])
    assert not torch.equal(painted, image)


def test_both_file_formats_of_torch_are_read(
    vqgan: State, diffusion: State, imported: Path, tmp_path: Path
) -> None:
    old_ckpt = write_ckpt(tmp_path / "a.ckpt", vqgan, legacy=True)
    old_pt = write_pt(tmp_path / "b.pt", diffusion, legacy=True)
    import_medical_diffusion(old_pt, tmp_path / "out", autoencoder=old_ckpt, choices=GRID)
    for name in ("autoencoder.safetensors", "denoiser.safetensors"):
        assert sha256_file(tmp_path / "out" / name) == sha256_file(imported / name)
    assert not any(module.startswith(("omegaconf", "pytorch_lightning")) for module in sys.modules)


def test_weights_are_the_averaged_ones_or_the_others(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, weights="model", choices=GRID)
    found = load_file(tmp_path / "out" / "denoiser.safetensors")["init_conv.weight"]
    saved = torch.load(pt, weights_only=True)
    assert torch.equal(found, saved["model"]["denoise_fn.init_conv.weight"])
    assert not torch.equal(found, saved["ema"]["denoise_fn.init_conv.weight"])


def test_without_the_ckpt_its_copy_in_the_pt_serves(imported: Path, pt: Path, tmp_path: Path) -> None:
    import_medical_diffusion(pt, tmp_path / "out", choices=SAID)
    name = "autoencoder.safetensors"
    assert sha256_file(tmp_path / "out" / name) == sha256_file(imported / name)


def test_what_is_said_rules_over_the_files(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    said = Choices(
        downsampling=(1, 2, 2),
        groups=2,
        padding="reflect",
        denoiser_groups=4,
        clip=False,
        sampler="ddim",
        orientation=("L", "P", "S"),
        axes=(0, 1, 2),
        channels=["T2"],
        extent="patch",
        licence="CC0-1.0",
        citation=["nobody"],
        dataset="mine",
    )
    card = import_medical_diffusion(
        pt, tmp_path / "out", autoencoder=ckpt, name="other", choices=said.over(GRID)
    ).card
    assert card.networks.autoencoder.model_dump(include={"downsampling", "groups", "padding"}) == {
        "downsampling": (1, 2, 2),
        "groups": 2,
        "padding": "reflect",
    }
    assert card.networks.denoiser.groups == 4
    assert card.networks.axes == (0, 1, 2)
    assert not card.networks.clip
    assert (card.name, card.channels, card.extent, card.licence) == ("other", ["T2"], "patch", "CC0-1.0")
    assert (card.citation, card.training.dataset, card.grid.orientation) == (
        ["nobody"],
        "mine",
        ("L", "P", "S"),
    )
    assert (card.defaults.sampler, card.defaults.steps) == ("ddim", 4)


def test_an_intensity_window_means_ct(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    said = Choices(intensity=window([(-1000.0, 400.0)])).over(GRID)
    card = import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, choices=said).card
    assert card.channels == ["CT"]
    assert (card.intensity.windows, card.intensity.clip) == ([(-1000.0, 400.0)], 1.0)


def test_one_factor_stands_for_all_axes(vqgan: State, pt: Path, tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "a.ckpt", vqgan, model_configuration(downsample=2))
    card = import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID).card
    assert card.networks.autoencoder.downsampling == (2, 2, 2)


def test_several_channels_share_one_pair_of_values(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "b.pt", diffusion_state(vqgan_state(channels=2)))
    card = import_medical_diffusion(path, tmp_path / "out", choices=SAID).card
    assert card.channels == ["MR 0", "MR 1"]
    assert card.intensity.typical == [(0.0, 1000.0)] * 2


def test_averaged_weights_may_be_rounded(diffusion: State, ckpt: Path, tmp_path: Path) -> None:
    key = "vqgan.encoder.conv_first.conv.weight"
    path = write_pt(tmp_path / "b.pt", changed(diffusion, **{key: diffusion[key] * (1 + 1e-5)}))
    import_medical_diffusion(path, tmp_path / "out", autoencoder=ckpt, choices=GRID)
    assert (tmp_path / "out" / "card.json").exists()


# -- what is asked for ---------------------------------------------------------------------------------------


def test_everything_that_is_missing_is_asked_for_at_once(pt: Path, tmp_path: Path) -> None:
    with pytest.raises(CardError) as caught:
        import_medical_diffusion(pt, tmp_path / "out")
    text = str(caught.value)
    assert "--downsampling of depth, height and width: 2,2,2 | 2,2,1 | 2,1,2 |" in text
    assert "--groups of the normalisation: 8 | 4 | 2 | 1;" in text
    assert "--padding: replicate | constant | reflect | circular" in text
    for option in ("--shape", "--spacing", "--window", "--percentiles"):
        assert option in text
    assert "difftumor" not in text
    assert not (tmp_path / "out").exists()


def test_what_the_ckpt_says_is_not_asked_for(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    with pytest.raises(CardError) as caught:
        import_medical_diffusion(
            pt, tmp_path / "out", autoencoder=ckpt, choices=Choices(shape=SHAPE, spacing=(1.0, 1.0, 1.0))
        )
    assert "--window" in str(caught.value)
    for option in ("--downsampling", "--groups", "--padding", "--shape", "--spacing"):
        assert option not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"downsample": "2,2,2"},
        {"downsample": [2, 2]},
        {"downsample": ["${x}", 2, 2]},
        {"num_groups": "many"},
        {"num_groups": [4]},
        {"padding_type": "mirror"},
        {"padding_type": 3},
    ],
)
def test_a_configuration_that_makes_no_sense(
    wrong: dict[str, Any], vqgan: State, pt: Path, tmp_path: Path
) -> None:
    path = write_ckpt(tmp_path / "a.ckpt", vqgan, model_configuration(**wrong))
    with pytest.raises(CardError, match=r"a\.ckpt: its configuration does not make sense"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID)
    import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=SAID)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Choices(downsampling=(4, 4, 4)), r"halves 1 time\(s\), so the largest factor is 2 \(--downsampling"),
        (Choices(downsampling=(2, 3, 2)), r"halves 1 time\(s\), so the largest factor is 2 \(--downsampling"),
        (Choices(groups=3), r"groups 3 must divide .*--groups"),
        (Choices(denoiser_groups=3), r"groups 3 must divide .*--denoiser-groups"),
        (Choices(orientation=("R", "R", "S")), "one of L and R"),
        (Choices(axes=(0, 0, 1)), "axes must name each"),
        (Choices(sampler="euler"), "'euler'; these networks have"),
        (Choices(steps=5), "defaults.steps is 5, the schedule has 4"),
        (Choices(channels=["A", "B"]), "2 channel names for 1"),
    ],
)
def test_choices_that_no_network_has(
    said: Choices, message: str, ckpt: Path, pt: Path, tmp_path: Path
) -> None:
    with pytest.raises(CardError, match=message):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, choices=said.over(GRID))
    assert not (tmp_path / "out").exists()


# -- what does not fit ---------------------------------------------------------------------------------------


def test_a_mismatch_names_the_keys_and_what_would_fit(vqgan: State, pt: Path, tmp_path: Path) -> None:
    other = changed(
        vqgan,
        decoder__final_block__0__bias=None,
        quant_conv__weight=torch.zeros(1),
        pre_vq_conv__conv__weight=torch.zeros(4, 3, 1, 1, 1),
    )
    path = write_ckpt(tmp_path / "a.ckpt", other)
    without = write_pt(tmp_path / "b.pt", diffusion_state({}))
    with pytest.raises(CardError) as caught:
        import_medical_diffusion(without, tmp_path / "out", autoencoder=path, choices=GRID)
    text = str(caught.value)
    assert f"{path} does not fit" in text
    assert "missing decoder.final_block.0.bias" in text
    assert "unexpected quant_conv.weight" in text
    assert "wrong shape pre_vq_conv.conv.weight 4x3x1x1x1 instead of 4x8x1x1x1" in text
    assert (
        "VQ-GAN with 1 image channel(s), 4 channels at full resolution, downsampling 2x2x2, 64 codes" in text
    )


def test_a_mismatch_of_the_denoiser(diffusion: State, tmp_path: Path) -> None:
    other = changed(
        diffusion,
        denoise_fn__time_mlp__1__bias=None,
        denoise_fn__extra=torch.zeros(2),
        denoise_fn__final_conv__1__bias=torch.zeros(9),
    )
    with pytest.raises(CardError) as caught:
        import_medical_diffusion(write_pt(tmp_path / "b.pt", other), tmp_path / "out", choices=SAID)
    text = str(caught.value)
    assert "missing time_mlp.1.bias; unexpected extra; wrong shape final_conv.1.bias 9 instead of 4" in text
    assert "U-Net from 4 to 4 channels, dim 8 times 1, 2, 2 heads of 32, first kernel 7, 8 groups" in text


def test_networks_that_do_not_belong_together(diffusion: State, ckpt: Path, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "b.pt", diffusion_state({}, channels=5))
    with pytest.raises(CardError, match="with a latent of 4 channels it must map 4, or 9"):
        import_medical_diffusion(path, tmp_path / "out", autoencoder=ckpt, choices=GRID)


@pytest.mark.parametrize("key", ["codebook.embeddings", "encoder.conv_first.conv.weight"])
def test_another_autoencoder_than_the_denoisers_is_refused(
    key: str, vqgan: State, pt: Path, tmp_path: Path
) -> None:
    path = write_ckpt(tmp_path / "a.ckpt", changed(vqgan, **{key: vqgan[key] * 1.01}))
    with pytest.raises(CardError, match=rf"is not the autoencoder that .*{key} is not vqgan\.{key}"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID)


def test_a_denoiser_without_an_autoencoder_needs_one(ckpt: Path, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "b.pt", diffusion_state({}))
    with pytest.raises(CardError, match=r"holds no VQ-GAN: give its \.ckpt file as --autoencoder"):
        import_medical_diffusion(path, tmp_path / "out", choices=SAID)
    import_medical_diffusion(path, tmp_path / "out", autoencoder=ckpt, choices=GRID)


def test_files_in_each_others_place(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"model-78\.pt is a denoiser .*: give it as --denoiser"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=pt, choices=SAID)
    with pytest.raises(CardError, match=r"vqgan\.ckpt is an autoencoder .*: give it as --autoencoder"):
        import_medical_diffusion(ckpt, tmp_path / "out", choices=SAID)


def test_files_of_another_kind(pt: Path, ckpt: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    cases: list[tuple[Any, str]] = [
        ({"weight": torch.zeros(1)}, r"which holds its weights as 'ema': it has \['weight'\]"),
        ([torch.zeros(1)], "holds a list, not the dictionary"),
        ({"ema": {"denoise_fn.x": "text"}}, r"ema\['denoise_fn.x'\] is a str, not a tensor"),
        ({"ema": {"x": torch.zeros(1)}}, "no tensors under 'denoise_fn.'"),
        ({"ema": {"denoise_fn.x": torch.zeros(1)}}, "does not hold betas"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(CardError, match=message):
            import_medical_diffusion(path, tmp_path / "out", choices=SAID)
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(CardError, match=r"file\.pt holds no VQ-GAN"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID)
    with pytest.raises(CardError, match="cannot read"):
        import_medical_diffusion(tmp_path / "no.pt", tmp_path / "out", choices=SAID)


def test_files_that_are_not_complete(ckpt: Path, pt: Path, vqgan: State, tmp_path: Path) -> None:
    old = write_ckpt(tmp_path / "old.ckpt", vqgan, legacy=True)
    path = tmp_path / "part.pt"
    for source in (ckpt, pt, old):
        whole = source.read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(CardError, match=r"part\.pt is no checkpoint that torch can read"):
                import_medical_diffusion(path, tmp_path / "out", choices=SAID)
    path.write_text("{}")
    with pytest.raises(CardError, match=r"part\.pt is no checkpoint"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID)
    assert not (tmp_path / "out").exists()


def test_networks_of_another_kind(vqgan: State, diffusion: State, pt: Path, tmp_path: Path) -> None:
    zeros = torch.zeros(32)
    batch_norm = changed(vqgan, encoder__conv_blocks__0__res__norm1__running_mean=zeros)
    path = write_ckpt(tmp_path / "a.ckpt", batch_norm)
    with pytest.raises(CardError, match=r"batch norm \(encoder\.conv_blocks\.0\.res\.norm1\.running_mean\)"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID)
    path = write_ckpt(tmp_path / "a.ckpt", vqgan, model_configuration(norm_type="batch"))
    with pytest.raises(CardError, match="norm_type is 'batch'"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=path, choices=GRID)
    width = diffusion["denoise_fn.downs.0.0.mlp.1.weight"].shape
    cases = [
        (changed(diffusion, denoise_fn__null_cond_emb=torch.zeros(1, 5)), "conditioned on a vector of 5 "),
        (
            changed(diffusion, denoise_fn__downs__0__0__mlp__1__weight=torch.zeros(width[0], width[1] + 5)),
            "conditioned on a vector of 5 ",
        ),
        (
            OrderedDict(schedule(4))
            | {"denoise_fn.time_embedder.0.weight": zeros, "denoise_fn.inc.conv.weight": zeros},
            "alternative denoiser `UNet` made of MONAI blocks",
        ),
        (
            changed(diffusion, betas=torch.linspace(1e-4, 0.02, 4)),
            r"betas\[3\] is 0\.02, 0\.9999 in the cosine schedule of 4 steps",
        ),
        (changed(diffusion, posterior_variance=None), "missing posterior_variance"),
        (changed(diffusion, logvar=torch.zeros(4)), "unexpected logvar"),
        (
            changed(diffusion, denoise_fn__init_conv__bias=torch.full((8,), torch.nan)),
            r"init_conv\.bias .*not finite",
        ),
    ]
    for state, message in cases:
        with pytest.raises(CardError, match=message):
            import_medical_diffusion(write_pt(tmp_path / "b.pt", state), tmp_path / "out", choices=SAID)


# -- what is never executed ----------------------------------------------------------------------------------


class _Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", ["ckpt", "pt", "cfg"])
def test_code_in_a_checkpoint_is_not_executed(
    container: str, legacy: bool, vqgan: State, diffusion: State, ckpt: Path, pt: Path, tmp_path: Path
) -> None:
    attack = _Attack(tmp_path / "executed")
    if container == "pt":
        pt = write_pt(tmp_path / "evil", diffusion, legacy=legacy, scaler=attack)
    else:
        cfg = model_configuration(lr=attack if container == "cfg" else 1e-3)
        extra = {"callbacks": attack} if container == "ckpt" else {}
        ckpt = write_ckpt(tmp_path / "evil", vqgan, cfg, legacy=legacy, **extra)
    with pytest.raises(CardError, match=r"evil holds '\w+\.system', .*it was not loaded"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, choices=GRID)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()
    # It works where it is let.
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "executed").exists()


def test_objects_of_other_libraries_are_named(diffusion: State, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "b.pt", diffusion, scaler=Path("x"))
    with pytest.raises(CardError, match=r"b\.pt holds 'pathlib\.\w+'"):
        import_medical_diffusion(path, tmp_path / "out", choices=SAID)


@pytest.mark.parametrize("version", ["2.2.3", "2.4.0"])
def test_configurations_that_omegaconf_itself_pickled(
    version: str, vqgan: State, pt: Path, tmp_path: Path
) -> None:
    content = read_checkpoint(Path(__file__).parent / "configurations" / f"omegaconf-{version}.bin")
    cfg = content["hyper_parameters"]["cfg"]
    assert cfg["model"]["downsample"] == [2, 2, 2]
    assert cfg["model"]["default_root_dir"] is None
    assert cfg["dataset"]["root_dir"] == "${oc.env:DATA,/data}/${dataset.name}"
    ckpt = write_ckpt(tmp_path / "a.ckpt", vqgan, hyper_parameters=content["hyper_parameters"])
    generator = import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, choices=GRID)
    assert generator.card.training.dataset == "MRNet"


def test_small_files_cannot_claim_to_be_large(diffusion: State, vqgan: State, tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]
    file = write_ckpt(tmp_path / "nested.ckpt", vqgan, callbacks=nested)
    assert len(read_checkpoint(file)["callbacks"]) == 2
    state = diffusion | {"betas": torch.zeros(1).expand(10**12)}
    with pytest.raises(CardError, match=r"ema\['betas'\] says that it has 1000000000000 numbers"):
        import_medical_diffusion(write_pt(tmp_path / "b.pt", state), tmp_path / "out", choices=SAID)


def test_unclipped_networks_start_from_the_noise_by_ddim(pt: Path, tmp_path: Path) -> None:
    card = import_medical_diffusion(pt, tmp_path / "out", choices=Choices(clip=False).over(SAID)).card
    assert (card.defaults.sampler, card.defaults.steps) == ("ddim", 4)
    with pytest.raises(CardError, match="these networks have ddim"):
        import_medical_diffusion(
            pt, tmp_path / "other", choices=Choices(clip=False, sampler="ancestral").over(SAID)
        )


# -- whole or not at all -------------------------------------------------------------------------------------


def test_an_output_that_holds_something_is_left_alone(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    import_medical_diffusion(pt, output, autoencoder=ckpt, choices=GRID)
    before = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}
    with pytest.raises(DiffaugError, match="exists and is no empty folder"):
        import_medical_diffusion(pt, output, autoencoder=ckpt, choices=GRID)
    assert {file.name: file.stat().st_mtime_ns for file in output.iterdir()} == before


def test_an_output_that_cannot_be_made_is_refused_before_the_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffaugError, match=r"cannot be made, since .*file is no folder to write in"):
        import_medical_diffusion(tmp_path / "no.pt", tmp_path / "file" / "out")
    with pytest.raises(DiffaugError, match="/proc/out cannot be made"), new_folder(Path("/proc/out")):
        pass


def test_an_import_that_fails_leaves_nothing(
    ckpt: Path, pt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("diffaug.generators.generator.atomic_write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, choices=GRID)
    assert list(tmp_path.iterdir()) == []


# -- DiffTumor -----------------------------------------------------------------------------------------------


def difftumor_file(folder: Path, steps: int) -> Path:
    """A small file in DiffTumor's layout: the denoiser sees two latents and a mask."""
    vqgan = vqgan_state(hidden=16, stages=2, latent=LATENT)
    return write_pt(folder / f"liver-{steps}.pt", diffusion_state(vqgan, steps, channels=2 * LATENT + 1))


@pytest.mark.parametrize(
    ("steps", "sampler", "visited"),
    [(4, "ancestral", [3, 2, 1, 0]), (200, "ddim", list(range(197, 0, -4)))],
)
def test_difftumor_inpaints(steps: int, sampler: str, visited: list[int], tmp_path: Path) -> None:
    small = Choices(shape=(16, 16, 12))
    generator = import_medical_diffusion(
        difftumor_file(tmp_path, steps), tmp_path / "liver", preset="difftumor", choices=small
    )
    card = generator.card
    assert card.verbs == ["inpaint", "encode", "decode"]
    assert card.defaults.sampler == sampler
    assert card.networks.clip == (steps == 4)
    assert (card.channels, card.extent, card.intensity.windows) == (["CT"], "patch", [(-175.0, 250.0)])
    assert "NC-ND" in card.licence
    assert any("Tumor" in entry for entry in card.citation)
    seen: list[int] = []
    generator.model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1])))
    image = torch.randint(-300, 400, (1, 1, 20, 18, 14), generator=torch.Generator().manual_seed(0)).float()
    mask = torch.zeros_like(image)
    mask[..., 6:12, 7:13, 4:9] = 1
    affine = torch.eye(4).numpy()
    painted = generator.inpaint(image, mask, None, affine, seed=1, allow_label_drift=True)
    assert seen == visited
    assert torch.equal(painted[mask == 0], image[mask == 0])
    new = painted[mask == 1]
    assert bool(new.isfinite().all())
    assert not torch.equal(new, image[mask == 1])
    assert not torch.equal(
        painted, generator.inpaint(image, mask, None, affine, seed=2, allow_label_drift=True)
    )


def test_difftumor_has_its_own_grid_and_axes(tmp_path: Path) -> None:
    path = difftumor_file(tmp_path, 4)
    generator = import_medical_diffusion(path, tmp_path / "liver", preset="difftumor")
    assert generator.card.grid.model_dump() == {
        "orientation": ("R", "A", "S"),
        "spacing": (1.0, 1.0, 1.0),
        "shape": (96, 96, 96),
        "outside": "mirror",
    }
    volume = torch.randn(1, 1, 4, 5, 6)
    assert torch.equal(generator.model._to_network(volume), volume.permute(0, 1, -1, -3, -2))


def test_a_masked_denoiser_without_the_preset_is_told_of_it(tmp_path: Path) -> None:
    path = difftumor_file(tmp_path, 4)
    with pytest.raises(CardError, match="--preset difftumor"):
        import_medical_diffusion(path, tmp_path / "out")
    said = Choices(downsampling=(4, 4, 4), groups=32).over(SAID)
    assert import_medical_diffusion(path, tmp_path / "out", choices=said).card.verbs[0] == "inpaint"


def test_the_preset_is_for_its_own_networks(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    with pytest.raises(CardError, match="leave the preset out"):
        import_medical_diffusion(pt, tmp_path / "out", autoencoder=ckpt, preset="difftumor")
    with pytest.raises(DiffaugError, match="no preset 'nonesuch'"):
        import_medical_diffusion(pt, tmp_path / "out", preset="nonesuch")  # type: ignore[arg-type]


# -- out -----------------------------------------------------------------------------------------------------


def test_out_and_in_again_is_the_same(imported: Path, tmp_path: Path) -> None:
    generator = Generator.load(imported)
    notes = export_medical_diffusion(generator, tmp_path / "files")
    assert any("strict=False" in note for note in notes)
    assert not any("codes" in note for note in notes)
    # Nothing is asked for.
    again = import_medical_diffusion(
        tmp_path / "files" / "model-0.pt",
        tmp_path / "again",
        autoencoder=tmp_path / "files" / "vqgan.ckpt",
        name="knee",
    )
    for name in ("autoencoder.safetensors", "denoiser.safetensors"):
        assert sha256_file(tmp_path / "again" / name) == sha256_file(imported / name)
    unlike = {"description", "versions"}
    assert again.card.model_dump(exclude=unlike) == generator.card.model_dump(exclude=unlike)
    assert torch.equal(again.sample(1, seed=5).image, generator.sample(1, seed=5).image)


def test_other_settings_than_the_usual_ones_survive(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    said = Choices(
        downsampling=(1, 2, 2),
        denoiser_groups=4,
        clip=False,
        bfloat16=True,
        sampler="ddim",
        steps=3,
        orientation=("L", "P", "S"),
        outside="background",
        axes=(1, 2, 0),
        extent="patch",
        intensity=window([(-1000.0, 400.0)]),
        licence="CC0-1.0",
    ).over(GRID)
    generator = import_medical_diffusion(pt, tmp_path / "a" / "same", autoencoder=ckpt, choices=said)
    export_medical_diffusion(generator, tmp_path / "files")
    again = import_medical_diffusion(
        tmp_path / "files" / "model-0.pt",
        tmp_path / "b" / "same",
        autoencoder=tmp_path / "files" / "vqgan.ckpt",
    )
    unlike = {"description", "versions"}
    assert again.card.model_dump(exclude=unlike) == generator.card.model_dump(exclude=unlike)


def test_exported_files_hold_only_tensors_and_plain_values(imported: Path, tmp_path: Path) -> None:
    export_medical_diffusion(Generator.load(imported), tmp_path / "files")
    saved = torch.load(tmp_path / "files" / "vqgan.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["cfg"]["model"]["downsample"] == [2, 2, 2]
    assert saved["hyper_parameters"]["cfg"]["dataset"] == {"name": "MRNet", "image_channels": 1}
    assert saved["pytorch-lightning_version"] == "1.6.4"
    assert saved["global_step"] == 114000
    saved = torch.load(tmp_path / "files" / "model-0.pt", weights_only=True)
    assert sorted(saved) == ["ema", "model", "scaler", "step"]
    assert saved["step"] == 78000
    for name, table in schedule(4).items():
        assert torch.allclose(saved["ema"][name], table, rtol=1e-5)


def test_a_scale_from_used_codes_survives_the_authors_code(ckpt: Path, pt: Path, tmp_path: Path) -> None:
    generator = import_medical_diffusion(pt, tmp_path / "all", autoencoder=ckpt, choices=GRID)
    used = generator.model.autoencoder.codebook.range(live_only=True)
    assert used != generator.model.autoencoder.codebook.range(live_only=False)
    networks = generator.card.networks.model_copy(update={"latent_range": used})
    card = generator.card.model_copy(update={"networks": networks})
    generator.model.networks = networks
    fitted = Generator(card, generator.model)
    before = {key: tensor.clone() for key, tensor in fitted.model.state_dict().items()}
    notes = export_medical_diffusion(fitted, tmp_path / "files")
    assert any("1 of the 64 codes" in note for note in notes)
    # The generator itself is as it was.
    assert all(torch.equal(tensor, before[key]) for key, tensor in fitted.model.state_dict().items())
    codes = torch.load(tmp_path / "files" / "vqgan.ckpt", weights_only=True)["state_dict"][
        "codebook.embeddings"
    ]
    assert (float(codes.min()), float(codes.max())) == used
    again = import_medical_diffusion(
        tmp_path / "files" / "model-0.pt", tmp_path / "again", autoencoder=tmp_path / "files" / "vqgan.ckpt"
    )
    assert again.card.networks.latent_range == used
    image, _, affine = fitted.sample(1, seed=1)
    assert torch.equal(again.encode(image, affine), fitted.encode(image, affine))
    # Near codes that training used, as latents of images are.
    codebook = fitted.model.autoencoder.codebook
    chosen = (codebook.N >= 1).nonzero().flatten().repeat(6)[: 4 * 8 * 8]
    noise = torch.randn(len(chosen), LATENT, generator=torch.Generator().manual_seed(0))
    near = codebook.embeddings[chosen] + 0.01 * noise
    latent = scale(near.T.reshape(1, LATENT, 4, 8, 8), used)
    assert torch.equal(again.decode(latent), fitted.decode(latent))


def test_a_scale_that_the_codebook_does_not_have(imported: Path, tmp_path: Path) -> None:
    generator = Generator.load(imported)
    networks = generator.card.networks.model_copy(update={"latent_range": (-5.0, 5.0)})
    generator.card = generator.card.model_copy(update={"networks": networks})
    with pytest.raises(CardError, match=r"scales its latents from -5\.0 \.\. 5\.0, its codebook spans"):
        export_medical_diffusion(generator, tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_generators_of_another_architecture_have_no_such_files(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    with pytest.raises(CardError, match="tiny is a joint-flow generator"):
        export_medical_diffusion(tiny_generator, tmp_path / "files")


def test_an_export_does_not_overwrite(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DiffaugError, match="exists and is no empty folder"):
        export_medical_diffusion(Generator.load(imported), tmp_path)


# -- published sizes -----------------------------------------------------------------------------------------


def test_an_import_of_published_sizes_is_an_eighth_and_its_export_has_the_key_lists(tmp_path: Path) -> None:
    rows = key_list("ddpm-dim32")
    upstream = 2 * sum(prod(shape) * (8 if kind == "torch.int64" else 4) for _, shape, kind in rows)
    assert upstream == pytest.approx(312.8e6, rel=0.01)
    # Written without what takes most of the room: the discriminators and VGG16.
    vqgan = fill(vqgan_shapes(hidden=16, latent=8, codes=16384))
    state = diffusion_state(vqgan, 300, dim=32, mults=(1, 2, 4, 8), channels=8, out=8, heads=8)
    path = write_pt(tmp_path / "b.pt", state)
    said = Choices(groups=32, shape=(64, 64, 64)).over(SAID)
    generator = import_medical_diffusion(path, tmp_path / "out", choices=said)
    assert parameter_count(generator.model.autoencoder) == 266_825
    assert parameter_count(generator.model.denoiser) == 9_981_512
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert size == pytest.approx(42.2e6, rel=0.01)
    export_medical_diffusion(generator, tmp_path / "files")
    for file, entry, name in (("vqgan.ckpt", "state_dict", "vqgan-222"), ("model-0.pt", "ema", "ddpm-dim32")):
        found = torch.load(tmp_path / "files" / file, weights_only=True)[entry]
        expected = [
            row for row in key_list(name) if not row[0].removeprefix("vqgan.").startswith(TRAINING_ONLY)
        ]
        assert [(key, tuple(t.shape), str(t.dtype)) for key, t in found.items()] == expected


# -- from the command line -----------------------------------------------------------------------------------


def test_in_and_out_from_the_command_line(ckpt: Path, pt: Path, imported: Path, tmp_path: Path) -> None:
    arguments = ["import", "medical-diffusion", "--autoencoder", str(ckpt), "--denoiser", str(pt)]
    output = tmp_path / "knee"
    arguments += ["--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("diffaug: ")
    assert "--shape" in result.stderr
    assert "Traceback" not in result.output
    arguments += ["--shape", "16,16,8", "--spacing", "1,1,2", "--percentiles", "0,100"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    assert "VQ-GAN with 1 image channel(s)" in result.stderr
    card = Generator.load(output).card
    unlike = {"versions"}
    assert card.model_dump(exclude=unlike) == Generator.load(imported).card.model_dump(exclude=unlike)
    result = CliRunner().invoke(
        app, ["export", "medical-diffusion", str(output), "--output", str(tmp_path / "files")]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "files")
    assert "strict=False" in result.stderr
    assert sorted(file.name for file in (tmp_path / "files").iterdir()) == ["model-0.pt", "vqgan.ckpt"]


def test_every_option_of_the_command_line(pt: Path, tmp_path: Path) -> None:
    options = {
        "--denoiser": pt,
        "--output": tmp_path / "out",
        "--weights": "model",
        "--shape": "16,8,16",
        "--spacing": "1,2,0.5",
        "--orientation": "lps",
        "--depth-axis": "J",
        "--window": "-1000,400",
        "--channel": "low dose CT",
        "--extent": "patch",
        "--downsampling": "2,2,1",
        "--groups": "2",
        "--padding": "constant",
        "--denoiser-groups": "4",
        "--sampler": "dpm-solver++",
        "--steps": "3",
        "--name": "chest",
        "--licence": "CC0-1.0",
        "--citation": "nobody",
        "--dataset": "LIDC",
    }
    pairs = [text for pair in options.items() for text in map(str, pair)]
    result = CliRunner().invoke(app, ["import", "medical-diffusion", "--no-clip", *pairs])
    assert result.exit_code == 0, result.output
    card = Generator.load(tmp_path / "out").card
    assert card.grid.model_dump() == {
        "orientation": ("L", "P", "S"),
        "spacing": (1.0, 2.0, 0.5),
        "shape": (16, 8, 16),
        "outside": "mirror",
    }
    assert card.networks.axes == (1, 0, 2)
    assert card.networks.autoencoder.downsampling == (2, 2, 1)
    assert (card.networks.autoencoder.groups, card.networks.autoencoder.padding) == (2, "constant")
    assert card.networks.denoiser.groups == 4
    assert not card.networks.clip
    assert card.intensity.windows == [(-1000.0, 400.0)]
    assert (card.channels, card.extent, card.name) == (["low dose CT"], "patch", "chest")
    assert (card.defaults.sampler, card.defaults.steps) == ("dpm-solver++", 3)
    assert (card.licence, card.citation, card.training.dataset) == ("CC0-1.0", ["nobody"], "LIDC")
    assert "(model weights)" in card.description


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--shape", "16,16"], "'16,16' is not 3 numbers"),
        (["--shape", "16.5,16,16"], "shape.0"),
        (["--spacing", "1,nan,1"], "'1,nan,1' is not 3 numbers"),
        (["--spacing", "1,0,1"], "spacing.1"),
        (["--orientation", "RA"], "orientation"),
        (["--window", "5,5"], "the lower number, then the higher"),
        (["--window", "0,1", "--percentiles", "0,100"], "neither --percentiles"),
        (["--typical", "0,1"], "--typical goes with --percentiles"),
        (["--percentiles", "60,100"], "a percentile below 50 and one above"),
        (["--percentiles", "100,0"], "the lower number, then the higher"),
        (["--window", "400,-1000"], "the lower number, then the higher"),
        (["--spacing", "1,1,-1"], "--spacing.2: Input should be greater than 0, not -1.0"),
        (["--downsampling", "4"], "write them like 2,2,2"),
        (["--padding", "mirror"], "padding"),
        (["--depth-axis", "Z"], "depth-axis"),
    ],
)
def test_options_that_make_no_sense(wrong: list[str], message: str, pt: Path, tmp_path: Path) -> None:
    arguments = ["import", "medical-diffusion", "--denoiser", str(pt), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, *wrong], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
