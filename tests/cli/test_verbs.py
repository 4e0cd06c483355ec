"""The verbs on single files: what they write is what the Generator gives, and the rest of a file stays."""

import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffaug.zoo
from diffaug.cli import app
from diffaug.cli.verbs import COMMANDS, parse_box
from diffaug.generators.generator import Generator
from tests.conftest import make_tiny_generator

ROOT = Path(__file__).parents[2]
# Other axes, directions and spacings than the generators', and a small rotation.
AFFINE = np.array([[0.0625, 0, -2, 40], [1.125, 0.0625, 0, -7], [0, -1.25, 0.0625, 9], [0, 0, 0, 1]])
SHAPE = (15, 17, 12)
STEPS = ("--steps", "2")


def diffaug_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """What a command prints to stdout."""
    result = diffaug_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: object) -> str:
    """The message of a command that the input stops."""
    result = diffaug_command(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("diffaug: ")
    return result.stderr


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Whole numbers from 20 to 99, brighter along the second axis."""
    image = np.random.default_rng(seed).integers(20, 60, shape)
    return image + np.linspace(0, 40, shape[1]).astype(int)[:, None]


def blocks(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    i, j, k = (n // 2 for n in shape)
    label[i - 2 : i + 2, j - 3 : j, k - 2 : k + 2] = 1
    label[i - 2 : i + 2, j : j + 3, k - 2 : k + 2] = 2
    return label


def write(
    path: Path,
    array: np.ndarray,
    dtype: str = "<i2",
    scaling: tuple[float, float] | None = None,
    affine: np.ndarray = AFFINE,
    kind: type = nib.Nifti1Image,
) -> Path:
    """A file whose header has more to lose than an affine."""
    stored = np.dtype(dtype)
    header = kind.header_class(endianness=">" if stored.byteorder == ">" else "<")
    header.set_data_dtype(stored)
    image = kind(array.astype(float) if scaling else array.astype(stored), affine, header)
    image.header.set_sform(affine, code="mni")
    image.header.set_xyzt_units("mm", "msec")
    image.header["descrip"] = b"scanned on a Friday"
    image.header["cal_max"] = 77
    image.header["intent_name"] = b"mine"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    if scaling:
        image.header.set_slope_inter(*scaling)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()


def stored(path: Path) -> np.ndarray:
    """Voxels as they are in the file, without scaling."""
    return np.array(nib.load(path).dataobj.get_unscaled())


def tensor(path: Path) -> torch.Tensor:
    """The image in a file, `(1, 1, I, J, K)` in its own units."""
    array = np.asanyarray(nib.load(path).dataobj)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))[None, None]


@pytest.fixture
def tiny(tiny_generator_folder: Path) -> Path:
    return tiny_generator_folder


@pytest.fixture
def loaded(tiny: Path) -> Generator:
    return Generator.load(tiny)


@pytest.fixture
def two_channels(tmp_path: Path) -> Path:
    make_tiny_generator(channels=2).save(tmp_path / "two")
    return tmp_path / "two"


@pytest.fixture
def medical(tmp_path: Path, medical_generator: Callable[..., Generator]) -> Path:
    medical_generator().save(tmp_path / "medical")
    return tmp_path / "medical"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write(tmp_path / "image.nii.gz", noise())


@pytest.fixture
def label(tmp_path: Path) -> Path:
    return write(tmp_path / "label.nii.gz", blocks(), dtype="uint8")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "made.nii.gz"


@pytest.fixture
def no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a generator is an error."""

    def load(name: object) -> Generator:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(diffaug.zoo, "load", load)


# -------- help


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_every_verb_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert {"--output", "--device", "--force", "--json"} <= set(re.findall(r"--[a-z-]+", result.output))


def test_verbs_have_a_panel_of_their_own() -> None:
    lines = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output.splitlines()
    panel = next(n for n, line in enumerate(lines) if "Verbs on single files" in line)
    names = [line.split()[1] for line in lines if re.match(r"[│|] +[a-z]", line)]
    first = [line.split()[1] for line in lines[:panel] if re.match(r"[│|] +[a-z]", line)]
    groups = {"bank", "nnunet", "zoo", "import", "export"}
    assert set(first) == {"fit", "build", "audit", "splits", "pretrain", "benchmark"} | groups
    assert names[len(first) :] == [command.__name__ for command in COMMANDS]


# -------- the same as from Python


def test_sample_is_the_verb(tiny: Path, loaded: Generator, out: Path) -> None:
    label = out.with_name("label.nii")
    command = ("sample", tiny, "--output", out, "--label-output", label)
    printed = succeed(*command, "--seed", 5, "--guidance", 2, "--sampler", "heun", *STEPS)
    made = loaded.sample(1, seed=5, steps=2, guidance=2, sampler="heun")
    assert printed.splitlines() == [str(out), str(label)]
    file = nib.load(out)
    assert file.get_data_dtype() == np.float32
    assert np.array_equal(file.dataobj, made.image[0, 0])
    assert np.array_equal(nib.load(label).dataobj, made.label[0, 0])
    for path in (out, label):
        assert np.array_equal(nib.load(path).affine, made.affine)
        assert nib.load(path).header["descrip"].item() == b"synthetic: tiny sample"
    assert not list(out.parent.glob(".tmp-*"))


def test_paint_is_the_verb_on_the_labels_voxels(
    tiny: Path, loaded: Generator, label: Path, out: Path
) -> None:
    succeed("paint", tiny, label, "-o", out, "--seed", 3, *STEPS)
    before, after = nib.load(label), nib.load(out)
    assert np.array_equal(after.affine, before.affine)
    for field in ("pixdim", "qform_code", "sform_code", "srow_x", "quatern_b", "xyzt_units"):
        assert np.array_equal(after.header[field], before.header[field]), field
    assert after.header["cal_max"] == 0
    assert after.header["intent_name"].item() == b""
    assert after.header["descrip"].item() == b"synthetic: tiny paint"
    assert np.array_equal(after.dataobj, loaded.paint(tensor(label), before.affine, seed=3, steps=2)[0, 0])


def test_paint_keeps_a_nifti_2_file_and_an_affine_that_only_the_qform_has(
    tiny: Path, loaded: Generator, tmp_path: Path, out: Path
) -> None:
    label = write(tmp_path / "label.nii", blocks(), dtype="uint8", kind=nib.Nifti2Image)
    file = nib.load(label)
    rigid = np.array([[0.6, -0.8, 0, 3], [0.8, 0.6, 0, 1], [0, 0, 1, 2], [0, 0, 0, 1]]) * [1.3, 1.3, 1.3, 1]
    file.header.set_qform(rigid, code=1)
    file.header.set_sform(None, code=0)
    turned = nib.Nifti2Image(np.array(np.asanyarray(file.dataobj)), None, file.header)
    nib.save(turned, label)
    affine = nib.load(label).affine
    assert np.allclose(affine, rigid, atol=1e-5)
    succeed("paint", tiny, label, "-o", out, *STEPS)
    assert isinstance(nib.load(out), nib.Nifti2Image)
    assert np.array_equal(nib.load(out).affine, affine)
    assert np.array_equal(nib.load(out).dataobj, loaded.paint(tensor(label), affine, steps=2)[0, 0])


def test_vary_is_the_verb(tiny: Path, loaded: Generator, image: Path, label: Path, out: Path) -> None:
    options = ("--seed", 4, "--strength", 0.7, "--guidance", 1.5, "--sampler", "euler", *STEPS)
    assert succeed("vary", tiny, image, "--label", label, "-o", out, *options) == f"{out}\n"
    varied = loaded.vary(
        tensor(image),
        tensor(label),
        nib.load(image).affine,
        strength=0.7,
        seed=4,
        steps=2,
        guidance=1.5,
        sampler="euler",
    )
    assert np.array_equal(stored(out), varied[0, 0])
    assert not np.array_equal(stored(out), stored(image))


def test_vary_passes_on_plain_box_mapping_and_drift(
    tiny: Path, loaded: Generator, image: Path, tmp_path: Path, out: Path
) -> None:
    affine = nib.load(image).affine
    succeed("vary", tiny, image, "-o", out, "--plain", "--allow-label-drift", *STEPS)
    plain = loaded.vary(tensor(image), None, affine, residual=False, allow_label_drift=True, steps=2)
    assert np.array_equal(stored(out), plain[0, 0])

    renamed = write(tmp_path / "renamed.nii.gz", blocks() * 10, dtype="uint8")
    box = "0:9,1:9,2:9"
    options = ("--label-mapping", "10=1", "--label-mapping", "20=0", "--box", box, "--force")
    succeed("vary", tiny, image, "--label", renamed, "-o", out, *options, *STEPS)
    mapped = loaded.vary(
        tensor(image),
        tensor(renamed),
        affine,
        label_mapping={10: 1, 20: 0},
        box=((0, 9), (1, 9), (2, 9)),
        steps=2,
    )
    assert np.array_equal(stored(out), mapped[0, 0])


def test_inpaint_is_the_verb_and_keeps_the_rest(
    tiny: Path, loaded: Generator, image: Path, label: Path, tmp_path: Path, out: Path
) -> None:
    region = np.zeros(SHAPE)
    region[4:11, 5:12, 3:9] = 3
    mask = write(tmp_path / "mask.nii", region, dtype="float32")
    succeed("inpaint", tiny, image, "--mask", mask, "--label", label, "-o", out, "--seed", 2, *STEPS)
    affine = nib.load(image).affine
    made = loaded.inpaint(tensor(image), tensor(mask), tensor(label), affine, seed=2, steps=2)
    before, after = stored(image), stored(out)
    assert np.array_equal(after, made[0, 0])
    assert np.array_equal(after[region == 0], before[region == 0])
    assert (after[region != 0] != before[region != 0]).mean() > 0.5
    assert content(out)[: -before.nbytes] == content(image)[: -before.nbytes]


def test_segment_is_the_verb(tiny: Path, loaded: Generator, image: Path, out: Path) -> None:
    succeed("segment", tiny, image, "-o", out, "--seed", 6, *STEPS)
    affine = nib.load(image).affine
    assert np.array_equal(nib.load(out).affine, affine)
    assert nib.load(out).get_data_dtype() == np.int16
    assert np.array_equal(nib.load(out).dataobj, loaded.segment(tensor(image), affine, seed=6, steps=2)[0, 0])
    assert stored(out).any()


def test_encode_and_decode_are_the_verbs(tiny: Path, loaded: Generator, image: Path, out: Path) -> None:
    latent = out.with_name("latent.safetensors")
    assert succeed("encode", tiny, image, "-o", latent) == f"{latent}\n"
    expected = loaded.encode(tensor(image), nib.load(image).affine)
    assert torch.equal(load_file(latent)["latent"], expected)
    succeed("decode", tiny, latent, "-o", out)
    assert np.array_equal(nib.load(out).dataobj, loaded.decode(expected)[0, 0])
    assert np.array_equal(nib.load(out).affine, loaded.grid.affine)


def test_medical_diffusion_has_the_same_commands(medical: Path, image: Path, out: Path) -> None:
    generator = Generator.load(medical)
    affine = nib.load(image).affine
    succeed("sample", medical, "-o", out, "--seed", 1)
    assert np.array_equal(nib.load(out).dataobj, generator.sample(1, seed=1).image[0, 0])

    options = ("--sampler", "ddim", "--steps", 3, "--force")
    succeed("vary", medical, image, "-o", out, "--allow-label-drift", *options)
    varied = generator.vary(tensor(image), None, affine, sampler="ddim", steps=3, allow_label_drift=True)
    assert np.array_equal(stored(out), varied[0, 0])

    mask = write(image.with_name("mask.nii.gz"), blocks() == 2, dtype="uint8")
    succeed("inpaint", medical, image, "--mask", mask, "-o", out, *options)
    kept = stored(mask) == 0
    assert np.array_equal(stored(out)[kept], stored(image)[kept])
    assert not np.array_equal(stored(out), stored(image))

    latent = out.with_name("latent.safetensors")
    succeed("encode", medical, image, "-o", latent)
    expected = generator.encode(tensor(image), affine)
    assert torch.equal(load_file(latent)["latent"], expected)
    succeed("decode", medical, latent, "-o", out, "--force")
    assert np.array_equal(nib.load(out).dataobj, generator.decode(expected)[0, 0])


def test_a_masked_denoiser_inpaints(
    medical_generator: Callable[..., Generator], image: Path, tmp_path: Path, out: Path
) -> None:
    """As DiffTumor's; whatever is not 0 is mask, in any type."""
    generator = medical_generator(masked=True)
    generator.save(tmp_path / "masked")
    region = blocks() == 2
    mask = write(tmp_path / "mask.nii.gz", region * 0.25, dtype="float32")
    succeed("inpaint", tmp_path / "masked", image, "--mask", mask, "-o", out, "--seed", 2)
    made = generator.inpaint(tensor(image), tensor(mask) != 0, None, nib.load(image).affine, seed=2)
    assert np.array_equal(stored(out), made[0, 0])
    assert not np.array_equal(stored(out), stored(image))


# -------- what stays in a file


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [
        ("<i2", None),
        (">i2", None),
        ("|u1", None),
        ("<u2", None),
        ("<i4", (0.01, 3.0)),
        ("<i8", None),
        ("<f4", None),
        (">f4", (0.3, -7.0)),
        ("<f8", (0.3, -7.0)),
        ("<i2", (0.5, -1024.0)),
        ("|u1", (-0.7, 110.0)),
    ],
)
def test_untouched_voxels_and_the_header_stay_whatever_the_type(
    tiny: Path, tmp_path: Path, dtype: str, scaling: tuple[float, float] | None, suffix: str
) -> None:
    # Longer than the grid: only voxels around the label can change.
    shape = (15, 17, 30)
    array = noise(shape) + (0.37 if np.dtype(dtype).kind == "f" else 0)
    image = write(tmp_path / f"image{suffix}", array, dtype, scaling)
    label = write(tmp_path / "label.nii.gz", blocks(shape), dtype="uint8")
    same, varied = tmp_path / f"same{suffix}", tmp_path / f"varied{suffix}"
    succeed("vary", tiny, image, "--label", label, "-o", same, "--strength", 0)
    assert content(same) == content(image)

    succeed("vary", tiny, image, "--label", label, "-o", varied, "--strength", 1, *STEPS)
    before, after = stored(image), stored(varied)
    assert after.dtype == before.dtype
    assert content(varied)[: -before.nbytes] == content(image)[: -before.nbytes]
    assert np.array_equal(after[..., 25:], before[..., 25:])
    assert np.array_equal(after[..., :5], before[..., :5])
    changed = after != before
    assert changed[..., 12:18].mean() > 0.3

    file = nib.load(image)
    real = torch.from_numpy(np.asanyarray(file.dataobj).astype(float))[None, None]
    expected = Generator.load(tiny).vary(real, tensor(label), file.affine, strength=1, steps=2)[0, 0].numpy()
    # A stored integer is off by half a step of the file's scaling at most, within what its type can hold.
    step = abs(scaling[0]) if scaling else 1
    if before.dtype.kind in "iu":
        limits = np.iinfo(before.dtype)
        slope, inter = scaling or (1, 0)
        expected = expected.clip(*sorted((limits.min * slope + inter, limits.max * slope + inter)))
    tolerance = step / 2 + 1e-9 if before.dtype.kind in "iu" else 1e-4
    assert np.abs(np.asanyarray(nib.load(varied).dataobj).astype(float) - expected).max() <= tolerance


def test_values_beyond_an_integer_type_are_clipped(
    tiny: Path, label: Path, tmp_path: Path, out: Path
) -> None:
    bright = np.clip(noise() * 3, 0, 255)
    image = write(tmp_path / "bright.nii.gz", bright, "uint8")
    succeed("vary", tiny, image, "--label", label, "-o", out, "--strength", 1, *STEPS)
    expected = Generator.load(tiny).vary(
        tensor(image), tensor(label), nib.load(image).affine, strength=1, steps=2
    )
    assert np.array_equal(stored(out), expected[0, 0])
    assert (stored(out) == 255).any()


def test_channels_in_files_of_their_own_or_in_one(
    two_channels: Path, label: Path, tmp_path: Path, out: Path
) -> None:
    arrays = [noise(seed=1), noise(seed=2) * 7]
    files = [
        write(tmp_path / "case_0000.nii.gz", arrays[0], "uint8"),
        write(tmp_path / "case_0001.nii", arrays[1], "<f4"),
    ]
    outputs = [out.with_name("first.nii.gz"), out.with_name("second.nii")]
    options = ("--label", label, "--seed", 8, *STEPS)
    succeed("vary", two_channels, *files, "-o", outputs[0], "-o", outputs[1], *options)
    both = torch.from_numpy(np.stack(arrays)).float()[None]
    varied = (
        Generator.load(two_channels)
        .vary(both, tensor(label), nib.load(label).affine, seed=8, steps=2)[0]
        .numpy()
    )
    assert stored(outputs[0]).dtype == np.uint8
    assert np.array_equal(stored(outputs[0]), np.rint(varied[0]).clip(0, 255))
    assert np.array_equal(stored(outputs[1]), varied[1])

    one = write(tmp_path / "case.nii.gz", np.stack(arrays, axis=3), "<f4")
    succeed("vary", two_channels, one, "-o", out, *options)
    assert np.array_equal(stored(out), np.moveaxis(varied, 0, 3))

    sampled = Generator.load(two_channels).sample(1, steps=2).image[0].numpy()
    succeed("sample", two_channels, "-o", out, "--force", *STEPS)
    assert np.array_equal(nib.load(out).dataobj, np.moveaxis(sampled, 0, 3))
    succeed("sample", two_channels, "-o", outputs[0], "-o", outputs[1], "--force", *STEPS)
    for path, channel in zip(outputs, sampled, strict=True):
        assert np.array_equal(nib.load(path).dataobj, channel)


def test_a_trailing_axis_of_one_stays(tiny: Path, label: Path, tmp_path: Path, out: Path) -> None:
    image = write(tmp_path / "image.nii.gz", noise()[..., None])
    succeed("vary", tiny, image, "--label", label, "-o", out, *STEPS)
    assert stored(out).shape == (*SHAPE, 1)


# -------- what is said


def test_json_says_what_makes_it_again(tiny: Path, image: Path, label: Path, out: Path) -> None:
    command = ("vary", tiny, image, "--label", label, "-o", out, "--label-mapping", "1=2", "--json", *STEPS)
    result = diffaug_command(*command)
    record = json.loads(result.stdout)
    assert record["outputs"] == [str(out)]
    assert record["inputs"] == [str(image), str(label)]
    assert (record["verb"], record["generator"], record["licence"]) == ("vary", "tiny", "CC0-1.0")
    assert record["weights"] == Generator.load(tiny).weights_hash
    assert record["parameters"] == {
        "strength": 0.5,
        "residual": True,
        "allow_label_drift": False,
        "label_mapping": {"1": 2},
        "seed": 0,
        "steps": 2,
        "guidance": 1.0,
        "sampler": "adams-bashforth",
    }
    assert "vary by tiny, licence CC0-1.0: seed 0, strength 0.5," in result.stderr


# -------- errors, all found before the generator is loaded


@pytest.mark.usefixtures("no_generator")
class TestBeforeLoading:
    def test_an_output_that_exists(self, tiny: Path, image: Path, label: Path, tmp_path: Path) -> None:
        taken = write(tmp_path / "taken.nii.gz", noise())
        before = taken.read_bytes()
        message = fail("vary", tiny, image, "--label", label, "-o", taken)
        assert str(taken) in message
        assert "--force" in message
        assert taken.read_bytes() == before

    def test_an_output_that_is_an_input(self, tiny: Path, image: Path, label: Path, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        other_name = tmp_path / "sub" / ".." / image.name
        message = fail("vary", tiny, image, "--label", label, "-o", other_name, "--force")
        assert "is what vary reads" in message

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("made.mgz", "must end with .nii.gz or .nii"),
            ("", "must end with"),
            ("folder.nii.gz", "is a folder"),
            ("label.nii.gz/made.nii.gz", "is no folder to write in"),
        ],
    )
    def test_an_output_that_cannot_be(
        self, tiny: Path, label: Path, tmp_path: Path, name: str, words: str
    ) -> None:
        (tmp_path / "folder.nii.gz").mkdir()
        assert words in fail("paint", tiny, label, "-o", tmp_path / name)

    def test_one_output_for_two_things(self, tiny: Path, out: Path) -> None:
        assert "is named twice" in fail("sample", tiny, "-o", out, "--label-output", out)

    def test_a_label_map_on_another_grid(
        self, tiny: Path, image: Path, label: Path, tmp_path: Path, out: Path
    ) -> None:
        larger = write(tmp_path / "larger.nii.gz", blocks((16, 17, 12)), "uint8")
        message = fail("vary", tiny, image, "--label", larger, "-o", out)
        assert all(str(part) in message for part in (larger, image, (16, 17, 12), SHAPE))
        moved = AFFINE.copy()
        moved[0, 3] += 1
        elsewhere = write(tmp_path / "moved.nii.gz", blocks(), "uint8", affine=moved)
        for option in ("--label", "--mask"):
            labelled = () if option == "--label" else ("--label", label)
            verb = "vary" if option == "--label" else "inpaint"
            message = fail(verb, tiny, image, *labelled, option, elsewhere, "-o", out)
            assert all(str(part) in message for part in (elsewhere, image, "41.0", "40.0", "differ by 1 mm"))

    def test_channels_that_do_not_match(
        self, tiny: Path, two_channels: Path, image: Path, label: Path, tmp_path: Path, out: Path
    ) -> None:
        message = fail("vary", two_channels, image, "--label", label, "-o", out)
        assert f"{image}: 1 channels" in message
        assert "channel 0, channel 1" in message
        assert "given 1 times for 2" in fail("vary", two_channels, image, image, "--label", label, "-o", out)
        other = out.with_name("other.nii")
        assert "give it once" in fail("sample", tiny, "-o", out, "-o", other)
        smaller = write(tmp_path / "smaller.nii", noise()[1:])
        message = fail("encode", two_channels, image, smaller, "-o", tmp_path / "l.safetensors")
        assert str(smaller) in message
        assert str(image) in message

    def test_voxels_that_are_no_numbers(self, tiny: Path, label: Path, tmp_path: Path, out: Path) -> None:
        array = noise().astype(np.float32)
        array[3, 4, 5] = np.nan
        broken = write(tmp_path / "broken.nii.gz", array, "<f4")
        message = fail("segment", tiny, broken, "-o", out)
        assert f"{broken} holds 1 voxels that are NaN" in message
        cut = tmp_path / "cut.nii.gz"
        cut.write_bytes(label.read_bytes()[:-40])
        assert f"{cut} cannot be read" in fail("paint", tiny, cut, "-o", out)

    def test_a_label_map_that_is_missing_or_unknown(
        self, tiny: Path, image: Path, tmp_path: Path, out: Path
    ) -> None:
        message = fail("vary", tiny, image, "-o", out)
        assert message.startswith(f"diffaug: {image}: ")
        assert "--allow-label-drift" in message
        other = write(tmp_path / "other.nii.gz", blocks() * 3, "uint8")
        message = fail("vary", tiny, image, "--label", other, "-o", out)
        assert message.startswith(
            f"diffaug: {other}: label id(s) [3, 6] are not in the generator's vocabulary"
        )
        assert "--label-mapping 3=2" in message

    def test_a_mask_without_voxels(
        self, tiny: Path, image: Path, label: Path, tmp_path: Path, out: Path
    ) -> None:
        mask = write(tmp_path / "mask.nii.gz", np.zeros(SHAPE), "uint8")
        message = fail("inpaint", tiny, image, "--mask", mask, "--label", label, "-o", out)
        assert f"{mask} is 0 everywhere" in message

    def test_a_box_beyond_the_image(self, tiny: Path, image: Path, label: Path, out: Path) -> None:
        message = fail("vary", tiny, image, "--label", label, "-o", out, "--box", "0:4,0:4,0:40")
        assert message.startswith(f"diffaug: {image}: box")

    def test_a_verb_or_labels_that_the_generator_lacks(self, medical: Path, image: Path, out: Path) -> None:
        assert "seed has no verb 'segment'; it has decode," in fail("segment", medical, image, "-o", out)
        label = out.with_name("label.nii")
        message = fail("sample", medical, "-o", out, "--label-output", label)
        assert "knows no labels: leave out --label-output" in message

    def test_a_file_that_holds_no_latent(self, tiny: Path, image: Path, tmp_path: Path, out: Path) -> None:
        assert f"{image} holds no latent" in fail("decode", tiny, image, "-o", out)
        other = tmp_path / "other.safetensors"
        save_file({"weights": torch.zeros(3)}, other)
        assert f"{other} holds no latent" in fail("decode", tiny, other, "-o", out)
        save_file({"latent": torch.zeros(3)}, other)
        assert f"{other} holds a tensor of the shape (3,)" in fail("decode", tiny, other, "-o", out)

    def test_an_unknown_generator(self, out: Path) -> None:
        assert "no-such is neither a generator of the zoo" in fail("sample", "no-such", "-o", out)

    def test_options_that_make_no_sense(self, tiny: Path, image: Path, tmp_path: Path, out: Path) -> None:
        drift = ("vary", tiny, image, "--allow-label-drift", "-o", out)
        for options in (("--box", "1:2,3:4"), ("--label-mapping", "1=2"), ("--strength", "1.5")):
            result = diffaug_command(*drift, *options)
            assert result.exit_code == 2
            assert options[0] in result.stderr or "is not a box" in result.stderr
        assert diffaug_command("paint", tiny, tmp_path / "none.nii.gz", "-o", out).exit_code == 2


def test_a_larger_scan_without_label_or_box_is_an_error_that_names_the_option(
    tiny: Path, tmp_path: Path, out: Path
) -> None:
    large = write(tmp_path / "large.nii.gz", noise((15, 17, 40)))
    message = fail("segment", tiny, large, "-o", out)
    assert message.startswith(f"diffaug: {large}: ")
    assert "or --box I0:I1,J0:J1,K0:K1 in voxels" in message
    succeed("segment", tiny, large, "-o", out, "--box", "0:15,0:17,10:20", *STEPS)
    assert not stored(out)[..., 30:].any()


def test_settings_that_the_generator_lacks_are_no_fault_of_the_file(
    medical: Path, image: Path, out: Path
) -> None:
    message = fail("vary", medical, image, "--steps", 13, "-o", out)
    assert message == "diffaug: steps must be at least 1 and at most 12, got 13\n"
    assert "has no sampler 'heun'" in fail("vary", medical, image, "--sampler", "heun", "-o", out)
    message = fail("vary", medical, image, "--label", image, "-o", out)
    assert message.startswith(f"diffaug: {image}: ")
    assert "--allow-label-drift" in message


def test_the_latent_of_another_generator_is_refused(
    tiny: Path, image: Path, tmp_path: Path, out: Path
) -> None:
    make_tiny_generator(seed=1).save(tmp_path / "other")
    latent = tmp_path / "latent.safetensors"
    succeed("encode", tiny, image, "-o", latent)
    message = fail("decode", tmp_path / "other", latent, "-o", out)
    assert f"{latent} is a latent of tiny with the weights" in message
    # One of the user's own making says nothing of its origin.
    save_file(load_file(latent), latent)
    succeed("decode", tmp_path / "other", latent, "-o", out)


def test_a_latent_with_broken_numbers_is_refused(tiny: Path, image: Path, tmp_path: Path, out: Path) -> None:
    latent = tmp_path / "latent.safetensors"
    succeed("encode", tiny, image, "-o", latent)
    broken = load_file(latent)
    broken["latent"][0, 0, 0, 0, :2] = torch.nan
    save_file(broken, latent)
    assert f"{latent} holds 2 numbers that are NaN or infinite" in fail("decode", tiny, latent, "-o", out)


def test_settings_are_refused_before_weights_are_read(
    tiny: Path, image: Path, label: Path, tmp_path: Path, out: Path
) -> None:
    (spoilt := tmp_path / "spoilt").mkdir()
    for file in tiny.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes() if file.name == "card.json" else b"no weights")
    command = ("vary", spoilt, image, "--label", label, "-o", out)
    assert "has no sampler 'ddim'" in fail(*command, "--sampler", "ddim")
    large = write(tmp_path / "large.nii.gz", np.tile(stored(image), (4, 4, 4)))
    message = fail("vary", spoilt, large, "-o", out, "--allow-label-drift")
    assert "give the object's label map" in message


def test_force_replaces_and_an_error_leaves_what_was_there(
    tiny: Path, label: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sample", tiny, "-o", out, "--label-output", out.with_name("label.nii.gz"), *STEPS)
    succeed(*command, "--seed", 1)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    assert len(before) == 2
    calls: list[bytes] = []

    def full_disk(content: bytes) -> bytes:
        calls.append(content)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return content

    with monkeypatch.context() as patched:
        patched.setattr("diffaug.datasets.layouts.compressed", full_disk)
        message = fail(*command, "--seed", 2, "--force")
    assert "label.nii.gz cannot be written: [Errno 28]" in message
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before

    def failing_sync(_: int) -> None:
        calls.append(b"")
        if len(calls) == 4:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("diffaug.files.os.fsync", failing_sync)
        assert "cannot be written: [Errno 5]" in fail(*command, "--seed", 2, "--force")
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    succeed(*command, "--seed", 2, "--force")
    assert {path: path.read_bytes() for path in out.parent.iterdir()}.keys() == before.keys()
    assert all(path.read_bytes() != old for path, old in before.items())


@pytest.mark.parametrize("text", ["", "1:2", "1:2,3:4", "1:2,3:4,5:6,7:8", "a:2,3:4,5:6", "-1:2,3:4,5:6"])
def test_anything_else_is_no_box(text: str) -> None:
    assert parse_box("1:2,3:4,05:60") == ((1, 2), (3, 4), (5, 60))
    with pytest.raises(typer.BadParameter, match="is not a box"):
        parse_box(text)


# -------- the page


def test_commands_of_the_page_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[:2] for words in commands] == [["diffaug", verb.__name__] for verb in COMMANDS]
    monkeypatch.chdir(tmp_path)
    for words in commands:
        for path in succeed(*words[1:]).splitlines():
            assert Path(path).is_file()


def test_links_of_the_page_lead_somewhere() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page)
    assert targets
    assert all((ROOT / "docs" / target).is_file() for target in targets)
