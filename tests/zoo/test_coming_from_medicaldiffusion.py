"""The commands of docs/coming-from-medicaldiffusion.md, in order, on small files of the upstream layout."""

import json
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from diffaug.cli import app
from diffaug.datasets.reading import read_dataset
from diffaug.generators.generator import Generator
from tests.zoo.upstream import diffusion_state, model_configuration, vqgan_state, write_ckpt, write_pt

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming-from-medicaldiffusion.md"
SHAPE, AFFINE = (16, 16, 8), np.diag([2.5, 2.5, 2.5, 1])
# What the page says of real sizes, for the small files of the test.
SMALLER = {
    "--shape 128,128,128": "--shape 16,16,8",
    "--cases 500": "--cases 2",
    "--cases 100": "--cases 2",
}


def commands() -> list[list[str]]:
    """The words of each command in the page's blocks without a language."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    for real, small in SMALLER.items():
        assert real in text
        text = text.replace(real, small)
    return [shlex.split(line) for line in text.splitlines() if line]


def write_scan(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    nib.save(nib.Nifti1Image(rng.integers(-1000, 400, SHAPE).astype(np.int16), AFFINE), path)


def write_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:10, 4:11, 2:6] = 1
    nib.save(nib.Nifti1Image(mask, AFFINE), path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has: checkpoints, a scan, a mask, and a dataset in nnU-Net's layout."""
    monkeypatch.chdir(tmp_path)
    vqgan = vqgan_state()
    checkpoints = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_ckpt(checkpoints / "latest_checkpoint.ckpt", vqgan)
    state = diffusion_state(vqgan, steps=20)
    write_pt(tmp_path / "model-78.pt", state, state)
    quartered = vqgan_state(stages=2)
    write_ckpt(tmp_path / "AutoencoderModel.ckpt", quartered, model_configuration(downsample=[4, 4, 4]))
    write_pt(tmp_path / "liver_early.pt", diffusion_state(quartered, steps=4, channels=9, out=4))
    write_scan(tmp_path / "scan.nii.gz")
    write_mask(tmp_path / "region.nii.gz")
    chest = tmp_path / "nnUNet_raw" / "Dataset001_Chest"
    for n in range(2):
        write_scan(chest / "imagesTr" / f"chest_{n}_0000.nii.gz", n)
        write_mask(chest / "labelsTr" / f"chest_{n}.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lung": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (chest / "dataset.json").write_text(json.dumps(description))
    return tmp_path


def test_the_page_takes_a_user_from_files_to_a_dataset_and_back(files: Path) -> None:
    ran = set()
    for words in commands():
        assert words[0] == "diffaug"
        if words[1] == "fit":
            continue
        if "difftumor" in words:
            words += ["--shape", "16,16,8", "--groups", "4"]
        if words[1] == "export":
            words[words.index("my-generator")] = "my-chest"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (words, result.output)
        ran.add(words[1])
    assert ran == {"import", "sample", "vary", "inpaint", "build", "export"}
    assert Generator.load(files / "my-chest").card.licence == "ours"
    assert Generator.load(files / "liver-early").verbs == {"inpaint", "encode", "decode"}
    sampled = read_dataset(files / "nnUNet_raw" / "Dataset910_SyntheticChest")
    assert len(sampled.cases) == 2
    assert all(case.label is None for case in sampled.cases)
    varied = read_dataset(files / "nnUNet_raw" / "Dataset911_VariedChest")
    assert all(case.label is not None for case in varied.cases)
    manifest = (files / "nnUNet_raw" / "Dataset911_VariedChest" / "manifest.json").read_text()
    assert '"allow_label_drift": true' in manifest
    assert sorted(p.name for p in (files / "checkpoints").iterdir()) == ["model-0.pt", "vqgan.ckpt"]
    mended, scan = (np.asarray(nib.load(files / f"{name}.nii.gz").dataobj) for name in ("mended", "scan"))
    mask = np.asarray(nib.load(files / "region.nii.gz").dataobj) > 0
    assert np.array_equal(mended[~mask], scan[~mask])
    assert not np.array_equal(mended[mask], scan[mask])


def test_links_of_the_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text())
    assert targets
    assert all((PAGE.parent / target).is_file() for target in targets)
