"""Importing MONAI's, MAISI's and NV-Generate's files, and the verbs of what comes of them."""

import json
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, RFlowScheduler
from torch import Tensor
from typer.testing import CliRunner

from diffaug import zoo
from diffaug.cli import app
from diffaug.errors import CardError, DiffaugError
from diffaug.generators.card import Card
from diffaug.generators.generator import Generator
from diffaug.generators.model import Sampling
from diffaug.generators.seeds import CaseNoise
from diffaug.zoo.monai import import_maisi, import_monai_bundle
from diffaug.zoo.monai.importing import BODY, Geometry
from diffaug.zoo.monai.templates import TEMPLATES

from .monai_upstream import LABELS, write_brain, write_brats, write_maisi, zipped

# A million parameters, as published.
PUBLISHED = {
    "brats-flair-ldm": (21.0, 189.3),
    "brain-t1-ldm": (13.8, 553.2),
    "maisi-ct": (20.94, 169.4),
    "nv-generate-ct": (20.94, 180.5),
}
SHAPE = (16, 24, 16)


@pytest.fixture(scope="module")
def brats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The bundle, and MONAI's networks with its weights."""
    folder = tmp_path_factory.mktemp("brats") / "bundle"
    return folder, *write_brats(folder)


@pytest.fixture(scope="module")
def brats_generator(brats: tuple[Path, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Generator:
    output = tmp_path_factory.mktemp("imported") / "brats"
    import_monai_bundle(brats[0], output, template="brats-flair-ldm")
    return zoo.load(output)


def maisi(folder: Path, *, flow: bool, control: bool = False, **geometry: Any) -> tuple[Generator, Any]:
    networks = write_maisi(folder / "files", flow=flow)
    more = {"control": folder / "files" / "control.pt", "label_dict": folder / "files" / "label_dict.json"}
    made = import_maisi(
        folder / "files" / "autoencoder.pt",
        folder / "files" / "denoiser.pt",
        folder / "generator",
        template="nv-generate-ct" if flow else "maisi-ct",
        config=folder / "files" / "config.json",
        geometry=Geometry(shape=SHAPE, **geometry),
        **(more if control else {}),
    )
    assert made.notes == []
    return zoo.load(folder / "generator"), networks


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_sizes(name: str) -> None:
    template = TEMPLATES[name]
    with torch.device("meta"):
        networks = template.autoencoder.build(), template.denoiser.build()
    found = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    assert found == pytest.approx(PUBLISHED[name], rel=3e-3)


def test_the_published_control_has_its_published_size() -> None:
    template = TEMPLATES["nv-generate-ct"]
    assert template.control is not None
    with torch.device("meta"):
        control = template.control.build(template.denoiser)
    assert sum(p.numel() for p in control.parameters()) / 1e6 == pytest.approx(72.0, rel=1e-3)


# -- bundles -----------------------------------------------------------------------------------------------


def test_a_bundles_networks_compute_what_monai_computes(
    brats: tuple[Path, Any, Any], brats_generator: Generator
) -> None:
    autoencoder = brats[1]
    generator, model = brats_generator, brats_generator.model
    assert generator.grid.shape == SHAPE
    assert generator.grid.spacing == (1.1, 1.1, 1.1)
    assert generator.card.licence == "Apache-2.0"
    image = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = model.encode_image(image)
        assert torch.allclose(latent, autoencoder.encode((image + 1) / 2)[0], atol=1e-5)
        assert torch.allclose(
            model.decode_image(latent), 2 * autoencoder.decode(latent) - 1, atol=1e-4, rtol=1e-4
        )


def test_all_steps_of_ddim_are_those_of_monai(
    brats: tuple[Path, Any, Any], brats_generator: Generator
) -> None:
    unet, model = brats[2], brats_generator.model
    noise = CaseNoise([7])
    found, _ = model.sample(noise, Sampling("ddim", 10))
    scheduler = DDIMScheduler(10, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
    scheduler.set_timesteps(10)
    x = CaseNoise([7]).draw(model.image_latent)
    with torch.no_grad():
        for step in scheduler.timesteps:
            x, _ = scheduler.step(unet(x, torch.tensor([step])), int(step), x)
    assert torch.allclose(found, x, atol=1e-4 * float(x.abs().max()))


def test_a_zip_is_read_like_its_folder(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    file = zipped(brats[0], tmp_path / "bundle.zip", **{"bundle/scripts/evil.py": "raise SystemExit"})
    made = import_monai_bundle(file, tmp_path / "made", template="brats-flair-ldm")
    assert [note.split(":")[0] for note in made.notes] == ["model.pt"]
    assert "did not apply" in made.notes[0]
    assert made.generator.grid.shape == SHAPE


@pytest.mark.parametrize("name", ["../out.pt", "/out.pt", "a/../../out.json", "..\\out.pt", "C:/out.pt"])
def test_a_zip_that_leads_out_is_refused(name: str, brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    file = zipped(brats[0], tmp_path / "bundle.zip", **{name: "x"})
    with pytest.raises(CardError, match="leads out of its folder"):
        import_monai_bundle(file, tmp_path / "made", template="brats-flair-ldm")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]


def test_links_are_refused(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    file = zipped(brats[0], tmp_path / "bundle.zip")
    link = zipfile.ZipInfo("bundle/models/other.pt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(CardError, match="holds the link"):
        import_monai_bundle(file, tmp_path / "made", template="brats-flair-ldm")
    folder = tmp_path / "bundle"
    shutil.copytree(brats[0], folder)
    (folder / "models" / "model.pt").rename(tmp_path / "outside.pt")
    (folder / "models" / "model.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(CardError, match="link that leads out"):
        import_monai_bundle(folder, tmp_path / "made", template="brats-flair-ldm")


def test_damaged_and_boastful_zips_are_refused(
    brats: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zipped(brats[0], tmp_path / "bundle.zip", **{"__MACOSX/bundle/models/._model.pt": "x"})
    import_monai_bundle(file, tmp_path / "mac", template="brats-flair-ldm")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(CardError, match="cannot be unpacked"):
        import_monai_bundle(file, tmp_path / "made", template="brats-flair-ldm")
    zipped(brats[0], file)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CardError, match=r"unpacks to .* set TMPDIR"):
        import_monai_bundle(file, tmp_path / "made", template="brats-flair-ldm")


def test_schedulers_that_are_not_known_are_refused(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(brats[0], folder)
    file = folder / "configs" / "inference.json"
    content = json.loads(file.read_text())
    for name, message in (("schedule", "'linear_beta'"), ("clip_sample", "True")):
        scheduler = {key: value for key, value in content["noise_scheduler"].items() if key != name}
        file.write_text(json.dumps(content | {"noise_scheduler": scheduler}))
        with pytest.raises(CardError, match=f"the scheduler's {name} is {message}"):
            import_monai_bundle(folder, tmp_path / "made", template="brats-flair-ldm")


def test_weights_that_are_no_numbers_are_refused(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(brats[0], folder)
    file = folder / "models" / "model.pt"
    state = torch.load(file, weights_only=True)
    state["conv_in.conv.bias"][0] = torch.nan
    torch.save(state, file)
    with pytest.raises(CardError, match=r"NaN or infinite numbers in conv_in\.conv\.bias"):
        import_monai_bundle(folder, tmp_path / "made", template="brats-flair-ldm")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("latent_channels", "$__import__('os').system('true')", "Expressions are Python code"),
        ("latent_channels", "@nowhere", "refers to @nowhere"),
        ("latent_channels", "@latent_channels", "refers to itself"),
        ("latent_shape", ["$@latent_channels + 1", 4, 4, 4], "Expressions are Python code"),
        ("latent_shape", ["a", "b", "c"], "not numbers: give the volumes' --shape"),
        ("latent_shape", [["@latent_shape"]] * 9, "refers to itself"),
    ],
)
def test_what_a_configuration_would_run_is_not_run(
    where: str, value: Any, message: str, brats: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(brats[0], folder)
    file = folder / "configs" / "inference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {where: value}))
    with pytest.raises(CardError, match=message):
        import_monai_bundle(folder, tmp_path / "made", template="brats-flair-ldm")
    assert not (tmp_path / "made").exists()


def test_what_no_file_says_is_asked_for(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"say whose conventions it has with --template"):
        import_monai_bundle(brats[0], tmp_path / "made")
    with pytest.raises(DiffaugError, match="there are brats-flair-ldm, brain-t1-ldm"):
        import_monai_bundle(brats[0], tmp_path / "made", template="other")


def test_weights_that_do_not_fit_are_named(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(brats[0], folder)
    file = folder / "models" / "model.pt"
    state = torch.load(file, weights_only=True)
    state["more"] = torch.zeros(1)
    state["out.2.conv.bias"] = torch.zeros(9)
    del state["conv_in.conv.bias"]
    torch.save(state, file)
    with pytest.raises(
        CardError,
        match=r"missing conv_in.conv.bias; unexpected more; wrong shape out.2.conv.bias 9 instead of 4",
    ):
        import_monai_bundle(folder, tmp_path / "made", template="brats-flair-ldm")


def test_the_brain_is_told_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_brain(tmp_path / "bundle")
    geometry = Geometry(shape=(16, 32, 16))
    import_monai_bundle(tmp_path / "bundle", tmp_path / "made", template="brain-t1-ldm", geometry=geometry)
    generator = zoo.load(tmp_path / "made")
    assert list(generator.card.parameters) == ["sex", "age", "ventricular_volume", "brain_volume"]
    seen: list[tuple[Tensor, Tensor]] = []
    unet = generator.model.denoiser
    forward = unet.forward  # type: ignore[union-attr]
    monkeypatch.setattr(
        unet,
        "forward",
        lambda x, t, context: seen.append((x, context)) or forward(x, t, context=context),  # type: ignore[func-returns-value,operator]
    )
    young = generator.sample(1, steps=2, parameters={"age": 0.1, "sex": "1"})
    x, context = seen[0]
    assert context[0, 0].tolist() == pytest.approx([1, 0.1, 0.5, 0.5])
    assert [x[0, 3 + n].unique().tolist() for n in range(4)] == [
        [pytest.approx(value)] for value in (1, 0.1, 0.5, 0.5)
    ]
    old = generator.sample(1, steps=2, parameters={"age": 0.9, "sex": 1})
    assert not torch.equal(young.image, old.image)
    with pytest.raises(DiffaugError, match=r"has no parameter 'weight'; it has sex, age"):
        generator.sample(1, parameters={"weight": 80})
    with pytest.raises(DiffaugError, match="age lies between 0 and 1, got 60"):
        generator.sample(1, parameters={"age": 60})
    with pytest.raises(DiffaugError, match="age is a number, not 'old'"):
        generator.sample(1, parameters={"age": "old"})


# -- MAISI -------------------------------------------------------------------------------------------------


def test_maisis_denoiser_is_told_spacing_and_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, networks = maisi(tmp_path, flow=False, spacing=(1.5, 1.5, 4.0))
    assert generator.model.networks.scale_factor == 2.5
    assert generator.grid.spacing == (1.5, 1.5, 4.0)
    told: dict[str, Tensor] = {}
    unet = generator.model.denoiser
    forward = unet.forward  # type: ignore[union-attr]

    def spy(x: Tensor, times: Tensor, **inputs: Tensor) -> Tensor:
        told.update(inputs)
        return forward(x, times, **inputs)  # type: ignore[operator,no-any-return]

    monkeypatch.setattr(unet, "forward", spy)
    made = generator.sample(1, steps=2, sampler="ddim", parameters={"top_region": "head"})
    assert told["spacing_tensor"].tolist() == [[150, 150, 400]]
    assert told["top_region_index_tensor"].tolist() == [[100, 0, 0, 0]]
    assert told["bottom_region_index_tensor"].tolist() == [[0, 0, 100, 0]]
    assert made.image.shape == (1, 1, *SHAPE)
    latent = CaseNoise([1]).draw(generator.model.image_latent)
    with torch.no_grad():
        expected = networks["autoencoder"].decode(latent / 2.5)
    assert torch.allclose(generator.model.decode_image(latent), 2 * expected - 1, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        DiffaugError, match="top_region is one of head, chest, abdomen, lower-body, not 'leg'"
    ):
        generator.sample(1, parameters={"top_region": "leg"})


def test_the_flow_is_integrated_exactly_or_as_monai_does(tmp_path: Path) -> None:
    generator, networks = maisi(tmp_path, flow=True)
    model, card = generator.model, generator.card
    numel = int(np.prod(model.image_latent[1:]))
    assert card.defaults.shift == pytest.approx((numel / 32**3) ** (1 / 3))
    scheduler = RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True, scale=1.4)
    scheduler.set_timesteps(10, input_img_size_numel=numel)
    x = CaseNoise([3]).draw(model.image_latent)
    spacing = torch.tensor([[150.0, 150.0, 200.0]])
    times = [*scheduler.timesteps, torch.tensor(0.0)]
    with torch.no_grad():
        for time, following in pairwise(times):
            velocity = networks["denoiser"](
                x, time[None].float(), class_labels=torch.tensor([1]), spacing_tensor=spacing
            )
            x, _ = scheduler.step(velocity, time, x, following)
    sampling = card.sampling("sample", 10, None, "monai-euler")
    found, _ = model.sample(CaseNoise([3]), sampling)
    assert torch.allclose(found, x, atol=1e-4 * float(x.abs().max()))
    exact, _ = model.sample(CaseNoise([3]), card.sampling("sample", 10, None, "euler"))
    assert not torch.allclose(exact, found, atol=1e-4 * float(x.abs().max()))


def test_guidance_looks_back_at_no_modality(tmp_path: Path) -> None:
    generator, networks = maisi(tmp_path, flow=True)
    card, model = generator.card, generator.model
    plain, guided = (
        model.sample(CaseNoise([1]), card.sampling("sample", 1, guidance, "euler"))[0]
        for guidance in (1.0, 3.0)
    )
    start = CaseNoise([1]).draw(model.image_latent)
    inputs = {"spacing_tensor": torch.tensor([[150.0, 150.0, 200.0]])}
    with torch.no_grad():
        told, untold = (
            networks["denoiser"](start, torch.tensor([1000.0]), class_labels=torch.tensor([n]), **inputs)
            for n in (1, 0)
        )
    expected = start + untold + 3 * (told - untold)
    assert float((guided - expected).abs().max()) < 0.05 * float((guided - plain).abs().max())


def test_control_paints_the_bits_of_label_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, _ = maisi(tmp_path, flow=True, control=True)
    assert generator.card.labels == {0: "background", BODY: "body"} | {n: name for name, n in LABELS.items()}
    assert "sample" not in generator.verbs
    seen: list[Tensor] = []
    control = generator.model.control
    forward = control.forward  # type: ignore[union-attr]

    def spy(x: Tensor, times: Tensor, controlnet_cond: Tensor, **inputs: Tensor) -> Any:
        seen.append(controlnet_cond)
        return forward(x, times, controlnet_cond=controlnet_cond, **inputs)  # type: ignore[operator]

    monkeypatch.setattr(control, "forward", spy)
    label = torch.zeros(1, 1, *SHAPE, dtype=torch.int16)
    label[0, 0, 2:14, 2:20, 2:14] = BODY
    label[0, 0, 4:8, 4:8, 4:8] = 62
    label[0, 0, 9:12, 9:12, 9:12] = 7
    affine = generator.grid.affine
    painted = generator.paint(label, affine, steps=2, label_mapping={7: 23})
    ids = torch.where(label == 7, 23, label)
    numbers = sum((seen[0][:, bit] * 2**bit for bit in range(8)), torch.zeros(1, *SHAPE))
    assert torch.equal(numbers.long(), ids[:, 0].long())
    other = generator.paint(torch.where(label == 62, 1, label), affine, steps=2, label_mapping={7: 23})
    assert painted.shape == label.shape
    assert not torch.equal(painted, other)
    with pytest.raises(DiffaugError, match=r"label id\(s\) \[7\] are not in the generator's vocabulary"):
        generator.paint(label, affine)


def test_a_control_goes_with_its_labels(tmp_path: Path) -> None:
    write_maisi(tmp_path / "files", flow=True)
    with pytest.raises(CardError, match="go together"):
        import_maisi(
            tmp_path / "files" / "autoencoder.pt",
            tmp_path / "files" / "denoiser.pt",
            tmp_path / "made",
            template="nv-generate-ct",
            control=tmp_path / "files" / "control.pt",
        )


def test_a_denoiser_without_its_scale_is_refused(tmp_path: Path) -> None:
    write_maisi(tmp_path / "files", flow=True)
    file = tmp_path / "files" / "denoiser.pt"
    content = torch.load(file, weights_only=True)
    for wrong in ({}, {"scale_factor": 0.0}, {"scale_factor": "1"}, {"scale_factor": np.float64(0)}):
        torch.save({"unet_state_dict": content["unet_state_dict"], **wrong}, file)
        with pytest.raises(CardError, match="scale_factor"):
            import_maisi(
                tmp_path / "files" / "autoencoder.pt",
                file,
                tmp_path / "made",
                template="nv-generate-ct",
                config=tmp_path / "files" / "config.json",
                geometry=Geometry(shape=SHAPE),
            )


# -- verbs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [False, True])
def test_verbs_on_real_cases(flow: bool, tmp_path: Path) -> None:
    generator, _ = maisi(tmp_path, flow=flow)
    random = torch.Generator().manual_seed(0)
    image = (2000 * torch.rand(1, 1, *SHAPE, generator=random) - 1000).to(torch.int16)
    how: dict[str, Any] = {"steps": 4, "sampler": None if flow else "ddim"}
    affine = generator.grid.affine
    same = generator.vary(image, None, affine, strength=0, allow_label_drift=True, **how)
    assert torch.equal(same, image)
    weak, strong = (
        generator.vary(image, None, affine, strength=strength, allow_label_drift=True, **how)
        for strength in (0.3, 0.9)
    )
    assert weak.dtype == torch.int16
    assert not torch.equal(weak, strong)
    mask = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    mask[0, 0, 4:12, 4:12, 4:12] = True
    made = generator.inpaint(image, mask, None, affine, allow_label_drift=True, **how)
    assert torch.equal(made[~mask], image[~mask])
    assert not torch.equal(made[mask], image[mask])
    latent = generator.encode(image, affine)
    assert latent.shape == (1, 4, 4, 6, 4)
    assert generator.decode(latent).shape == (1, 1, *SHAPE)


def test_windows_decode_within_what_overlap_smooths(tmp_path: Path) -> None:
    whole, _ = maisi(tmp_path / "whole", flow=True)
    parts, _ = maisi(tmp_path / "parts", flow=True, window=(4, 4, 4))
    latent = CaseNoise([1]).draw(whole.model.image_latent)
    assert parts.decode(latent).shape == whole.decode(latent).shape
    assert parts.model.networks.autoencoder_bytes < whole.model.networks.autoencoder_bytes


def test_a_window_larger_than_the_latent_is_all_of_it(tmp_path: Path) -> None:
    generator, _ = maisi(tmp_path, flow=True, window=(64, 4, 64))
    assert generator.sample(1, steps=1).image.shape == (1, 1, *SHAPE)


def test_attention_never_holds_all_pairs(tmp_path: Path) -> None:
    generator, _ = maisi(tmp_path, flow=True)
    blocks = [m for m in generator.model.denoiser.modules() if type(m).__name__ == "SABlock"]
    assert blocks
    assert all(block.use_flash_attention for block in blocks)


def test_too_little_memory_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    generator, _ = maisi(tmp_path, flow=True)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    latent = CaseNoise([1]).draw(generator.model.image_latent)
    monkeypatch.setattr(generator.model.denoiser, "forward", None)
    for work in (lambda: generator.decode(latent), lambda: generator.sample(1)):
        with pytest.raises(DiffaugError, match=r"about .* GiB, of which cpu has 0.0 free: give .*window"):
            work()


# -- cards and commands ------------------------------------------------------------------------------------


def test_a_card_names_what_its_networks_are_told(brats_generator: Generator) -> None:
    content = json.loads(brats_generator.card.model_dump_json())
    content["parameters"] = {"age": {"description": "", "default": 0.5}}
    with pytest.raises(ValueError, match="the networks are told nothing, the card names age"):
        Card.model_validate(content)
    content["parameters"] = {}
    content["grid"]["spacing"] = [1, 1, 1]
    with pytest.raises(ValueError, match="the grid's spacing"):
        Card.model_validate(content)


def test_from_files_in_the_upstream_layouts_to_nifti(brats: tuple[Path, Any, Any], tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        return result.stdout

    generator = tmp_path / "brats"
    printed = run("import", "monai-bundle", brats[0], "--template", "brats-flair-ldm", "-o", generator)
    assert printed.strip() == str(generator)
    run("sample", generator, "--steps", "2", "-o", tmp_path / "brats.nii.gz")
    write_maisi(tmp_path / "files", flow=True)
    files = tmp_path / "files"
    shared = ["--autoencoder", files / "autoencoder.pt", "--denoiser", files / "denoiser.pt"]
    shared += ["--config", files / "config.json", "--shape", "16,24,16", "--spacing", "2,2,2"]
    shared += ["--template", "nv-generate-ct"]
    control = ["--control", files / "control.pt", "--label-dict", files / "label_dict.json"]
    run("import", "maisi", *shared, "-o", tmp_path / "ct")
    run("import", "maisi", *shared, *control, "-o", tmp_path / "painter")
    told = ["--steps", "2", "--parameter", "modality=ct_contrast", "--json"]
    made = json.loads(run("sample", tmp_path / "ct", *told, "-o", tmp_path / "ct.nii.gz"))
    assert made["parameters"]["parameters"] == {"modality": "ct_contrast"}
    label = np.zeros(SHAPE, np.uint8)
    label[4:10, 4:10, 4:10] = 7
    nib.save(nib.Nifti1Image(label, np.diag([2.0, 2, 2, 1])), tmp_path / "label.nii.gz")
    (tmp_path / "table.csv").write_text("source,generator\n7,Lung Tumor\n")
    told += ["--label-mapping", tmp_path / "table.csv"]
    run("paint", tmp_path / "painter", tmp_path / "label.nii.gz", *told, "-o", tmp_path / "painted.nii.gz")
    write_brain(tmp_path / "brain-files")
    geometry = ["--template", "brain-t1-ldm", "--shape", "16,32,16"]
    run("import", "monai-bundle", tmp_path / "brain-files", *geometry, "-o", tmp_path / "brain")
    aged = ["--steps", "2", "--parameter", "age=0.3", "-o", tmp_path / "brain.nii.gz"]
    run("sample", tmp_path / "brain", *aged)
    write_maisi(tmp_path / "ddpm-files", flow=False)
    ddpm = [str(part).replace("/files/", "/ddpm-files/").replace("nv-generate", "maisi") for part in shared]
    run("import", "maisi", *ddpm, "-o", tmp_path / "ddpm")
    region = ["--steps", "2", "--sampler", "dpm-solver++", "--parameter", "top_region=head"]
    run("sample", tmp_path / "ddpm", *region, "-o", tmp_path / "ddpm.nii.gz")
    for name in ("brats", "ct", "painted", "brain", "ddpm"):
        volume = nib.load(tmp_path / f"{name}.nii.gz")
        assert volume.shape == ((16, 32, 16) if name == "brain" else SHAPE)
        assert np.isfinite(volume.get_fdata()).all()
    wrong = CliRunner().invoke(
        app, ["sample", str(tmp_path / "ct"), "--parameter", "age", "-o", str(tmp_path / "x.nii")]
    )
    assert wrong.exit_code == 2
