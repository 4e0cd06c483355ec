"""The card is validated wherever it is read, and says what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch

from diffaug.errors import CardError
from diffaug.generators.card import card_json, read_card
from diffaug.generators.generator import Generator

WEIGHTS = "joint_flow.safetensors"


@pytest.fixture
def folder(tiny_generator_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny generator's folder, to spoil."""
    for file in tiny_generator_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "card.json"
    card = json.loads(path.read_text())
    edit(card)
    path.write_text(json.dumps(card))
    return path


def test_a_card_comes_back_from_its_json(folder: Path) -> None:
    card = read_card(folder / "card.json")
    assert card_json(card) == json.loads((folder / "card.json").read_text())
    grid = card.to_grid()
    assert (grid.orientation, grid.spacing, grid.shape) == (("R", "A", "S"), (1.5, 1.5, 1.5), (16, 24, 16))
    assert nib.aff2axcodes(grid.affine) == ("R", "A", "S")
    assert card.labels == {0: "background", 1: "head", 2: "body"}


def shorten(card: dict[str, Any], *path: str) -> None:
    for key in path[:-1]:
        card = card[key]
    card[path[-1]] = card[path[-1]][:-1]


@pytest.mark.parametrize(
    ("edit", "field", "message"),
    [
        (lambda c: c.pop("licence"), "licence", "required"),
        (lambda c: c.update(colour="red"), "colour", "not permitted"),
        (lambda c: c.update(format=2), "format", "1"),
        (lambda c: c.update(name="../evil"), "name", "pattern"),
        (lambda c: c.update(extent="everything"), "extent", "object"),
        (lambda c: c.update(architecture="gan"), "architecture", "joint-flow"),
        (lambda c: c["verbs"].append("dream"), "verbs.7", "paint"),
        (lambda c: c.update(verbs=[]), "verbs", "at least 1"),
        (lambda c: c["grid"].update(spacing=[1.5, 0, 1.5]), "grid.spacing.1", "greater than 0"),
        (lambda c: c["grid"].update(shape=[16, 24]), "grid.shape", "required"),
        (lambda c: c["grid"].update(orientation=["R", "L", "S"]), "grid.orientation", "one of L and R"),
        (lambda c: c["grid"].update(orientation=["R", "A", "X"]), "grid.orientation", "one of L and R"),
        (lambda c: c["defaults"].update(steps=0), "defaults.steps", "greater than or equal to 1"),
        (lambda c: c["defaults"].update(strength=1.2), "defaults.strength", "less than or equal to 1"),
        (lambda c: c["defaults"].update(strength_range=[0.6, 0.2]), "defaults.strength_range", "low <= high"),
        (lambda c: c["intensity"].update(typical=[[5, 5]]), "intensity", "low < high"),
        (lambda c: c["labels"].update({"-1": "x"}), "labels.-1", "greater than or equal to 0"),
        (lambda c: c["labels"].update({"40000": "x"}), "labels.40000", "32767"),
        (lambda c: c["files"].update({WEIGHTS: "abc"}), f"files.{WEIGHTS}", "pattern"),
        (lambda c: c["networks"]["denoiser"].update(image_channels=9), "networks", "image_channels differ"),
        (lambda c: c["networks"]["denoiser"].update(label_channels=9), "networks", "label_channels differ"),
        (
            lambda c: c["networks"]["denoiser"].update(latent_shape=[5, 6, 4]),
            "networks",
            "multiple of the patch",
        ),
        (
            lambda c: shorten(c, "networks", "image_autoencoder", "widths"),
            "networks",
            "one width per halving",
        ),
        (
            lambda c: c["networks"]["label_autoencoder"].update(downsampling=[4, 4, 2]),
            "networks",
            "differ in their downsampling",
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_and_field(
    folder: Path, edit: Callable[[dict[str, Any]], object], field: str, message: str
) -> None:
    path = change(folder, edit)
    with pytest.raises(CardError) as caught:
        read_card(path)
    first, *lines = str(caught.value).splitlines()
    assert str(path) in first
    assert any(line.startswith(f"  {field}") and message in line for line in lines), str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["channels"].append("T2"), "2 channel names for 1 channels"),
        (lambda c: c["intensity"]["typical"].append([0, 1]), "2 entries, not 1"),
        (lambda c: c["grid"].update(shape=[16, 24, 20]), "grid's shape"),
        (lambda c: c["labels"].pop("0"), "background"),
        (
            lambda c: c["defaults"].update(sampler="magic"),
            "'magic'; these networks have adams-bashforth, euler",
        ),
        (lambda c: c["labels"].pop("2"), "2 labels are named, the networks know 3"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(
    folder: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(CardError, match=message):
        read_card(change(folder, edit))


def test_verbs_that_need_labels_need_labels(folder: Path) -> None:
    def forget_labels(card: dict[str, Any]) -> None:
        card["labels"] = {}
        card["networks"]["label_autoencoder"] = None
        card["networks"]["denoiser"]["label_channels"] = 0

    with pytest.raises(CardError, match="these networks cannot paint, segment"):
        read_card(change(folder, forget_labels))


def test_all_problems_are_listed_at_once(folder: Path) -> None:
    path = change(folder, lambda c: c.update(extent="nowhere", licence=3, name="a b"))
    with pytest.raises(CardError) as caught:
        read_card(path)
    assert {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]} == {
        "extent",
        "licence",
        "name",
    }


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_a_card_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "card.json").write_bytes(content)
    with pytest.raises(CardError, match=r"card\.json is not valid"):
        Generator.load(folder)


def test_a_missing_card(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"cannot read the card .*card\.json"):
        Generator.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../weights.safetensors", "/etc/hostname", "sub/weights.safetensors", "..", ".", "", "a\\b", ".hidden"],
)
def test_weights_outside_the_folder_are_refused_unread(folder: Path, name: str) -> None:
    path = change(folder, lambda c: c["files"].update({name: "0" * 64}))
    with pytest.raises(CardError, match="files"):
        read_card(path)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CardError, match=rf"{WEIGHTS} is missing.*copy the whole folder"):
        Generator.load(folder)


@pytest.mark.parametrize("at", [0, -1])
def test_altered_weights(folder: Path, at: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[at] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CardError, match=rf"{WEIGHTS} has SHA-256 [0-9a-f]{{64}}, the card says"):
        Generator.load(folder)


def test_a_card_that_lists_no_weights(folder: Path) -> None:
    change(folder, lambda c: c.update(files={}))
    with pytest.raises(CardError, match=rf"does not list \['{WEIGHTS}'\]"):
        Generator.load(folder)


def test_weights_of_other_networks(folder: Path) -> None:
    change(folder, lambda c: c["networks"]["denoiser"].update(depth=3))
    with pytest.raises(CardError, match=r"does not fit the card: missing denoiser\.blocks\.2"):
        Generator.load(folder)
    change(folder, lambda c: c["networks"]["denoiser"].update(depth=2, width=24))
    with pytest.raises(CardError, match="wrong shape"):
        Generator.load(folder)


def test_a_spoilt_plan_is_named(folder: Path) -> None:
    (folder / "plan.json").write_text("{")
    with pytest.raises(CardError, match=r"plan\.json cannot be read as JSON"):
        Generator.load(folder)


def test_weights_hash_names_the_weights(folder: Path) -> None:
    generator = Generator.load(folder)
    before = generator.weights_hash
    assert before == generator.card.files[WEIGHTS]
    with torch.no_grad():
        next(generator.model.parameters()).add_(1)
    generator.save(folder)
    assert generator.weights_hash != before
    assert Generator.load(folder).weights_hash == generator.weights_hash
