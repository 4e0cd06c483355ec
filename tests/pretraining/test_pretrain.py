"""Pretraining from plan to weights, and the real frameworks that load them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaug.datasets.building import build_dataset
from diffaug.datasets.reading import read_dataset
from diffaug.errors import DiffaugError, LabelError
from diffaug.generators.generator import Generator
from diffaug.pretraining import pretrain as module
from diffaug.pretraining.loading import load_pretrained
from diffaug.pretraining.plan import PretrainingPlan, Stage
from diffaug.pretraining.preparing import Asked, make_plan, read_material
from diffaug.pretraining.pretrain import pretrain, read_weights
from diffaug.progress import Progress
from diffaug.segmentation.networks import NetworkPlan, build_network
from diffaug.segmentation.training import Schedule
from diffaug.training.processes import make_accelerator
from tests.benchmark.test_benchmark import write_dataset
from tests.conftest import make_tiny_generator
from tests.segmentation.test_networks import SMALL, nnunet_plans

QUIET = Progress(quiet=True)
DYNUNET = NetworkPlan(settings={"filters": [4, 8, 16]})
SHORT = Schedule(steps=4, learning_rate=0.01)


def stages(*methods: str) -> list[Stage]:
    return [Stage.model_validate({"method": method, "schedule": SHORT}) for method in methods]


def asked(generator: Generator, **changes: Any) -> Asked:
    own: dict[str, Any] = {
        "network": DYNUNET,
        "stages": stages("masked", "supervised"),
        "datasets": [],
        "generators": [generator],
        "patch": (16, 24, 16),
    }
    return Asked(**(own | changes))


def run(order: Asked, output: Path) -> PretrainingPlan:
    plan = make_plan(order)
    material = read_material(plan, order.datasets, order.generators, QUIET)
    pretrain(plan, material, output, make_accelerator("cpu"), QUIET)
    return plan


def test_from_a_generator_to_monai(tiny_generator: Generator, tmp_path: Path) -> None:
    plan = run(asked(tiny_generator), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert record["sources"][0]["generator"] == "tiny"
    assert record["licences"] == ["CC0-1.0"]
    assert [stage["method"] for stage in record["stages"]] == ["masked", "supervised"]
    assert all(entry["loss"] > 0 for stage in record["stages"] for entry in stage["history"])
    assert record["space"]["patch"] == [16, 24, 16]
    assert record["network"]["settings"] == {"filters": [4, 8, 16]}
    assert record["intensity"]["clip_percentiles"] == [0.5, 99.5]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    network = build_network(DYNUNET, 1, 3)
    network.load_state_dict(torch.load(tmp_path / "out" / "monai.pt", weights_only=True))
    weights = read_weights(tmp_path / "out")
    assert not load_pretrained(build_network(DYNUNET, 1, 3), weights).left_out
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert plan.labels == {0: "background", 1: "head", 2: "body"}


@pytest.mark.parametrize("kind", ["segresnet", "unet", pytest.param("swinunetr", marks=pytest.mark.slow)])
def test_masked_networks_of_monai_are_loaded_without_their_last_layer(
    kind: str, tiny_generator: Generator, tmp_path: Path
) -> None:
    network = NetworkPlan.model_validate({"kind": kind, "settings": SMALL[kind]})
    patch = (32, 32, 64) if kind == "swinunetr" else (16, 24, 16)
    run(asked(tiny_generator, network=network, stages=stages("masked"), patch=patch), tmp_path / "out")
    fresh = build_network(network, 1, 3)
    found = fresh.load_state_dict(torch.load(tmp_path / "out" / "monai.pt", weights_only=True), strict=False)
    assert not found.unexpected_keys
    assert 0 < len(found.missing_keys) < 8


@pytest.mark.slow
def test_the_seeds_method_leaves_an_encoder(tiny_generator: Generator, tmp_path: Path) -> None:
    network = NetworkPlan.model_validate({"kind": "swinunetr", "settings": SMALL["swinunetr"]})
    patch = (32, 32, 64)
    order = asked(tiny_generator, network=network, stages=stages("swin", "supervised"), patch=patch)
    run(order, tmp_path / "both")
    run(asked(tiny_generator, network=network, stages=stages("swin"), patch=patch), tmp_path / "alone")
    fresh = build_network(network, 1, 3)
    found = fresh.load_state_dict(
        torch.load(tmp_path / "alone" / "monai.pt", weights_only=True), strict=False
    )
    assert not found.unexpected_keys
    assert not any(name.startswith("swinViT.") for name in found.missing_keys)
    with pytest.raises(DiffaugError, match="pretrains a swinunetr, not a dynunet"):
        make_plan(asked(tiny_generator, stages=stages("swin")))
    with pytest.raises(DiffaugError, match="two equal sides"):
        make_plan(asked(tiny_generator, network=network, stages=stages("swin"), patch=(32, 64, 96)))


def test_interrupted_it_goes_on_to_the_same_bytes(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(asked(tiny_generator), tmp_path / "whole")
    calls = 0
    losses = module._losses

    def failing(aim: Any, network: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return losses(aim, network, step)

    monkeypatch.setattr(module, "_losses", failing)
    with pytest.raises(KeyboardInterrupt):
        run(asked(tiny_generator), tmp_path / "stopped")
    run(asked(tiny_generator), tmp_path / "stopped")
    assert calls == 9  # the step that failed, and the last one
    for name in ("weights.safetensors", "plan.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_pretraining_is_not_overwritten(tiny_generator: Generator, tmp_path: Path) -> None:
    run(asked(tiny_generator, stages=stages("masked")), tmp_path / "out")
    with pytest.raises(DiffaugError, match=r"holds another pretraining.*seed"):
        run(asked(tiny_generator, stages=stages("masked"), seed=1), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(DiffaugError, match="holds no pretraining"):
        run(asked(tiny_generator), tmp_path / "other")


def test_from_datasets_real_and_synthetic(tiny_generator: Generator, tmp_path: Path) -> None:
    real = read_dataset(write_dataset(tmp_path / "real"))
    build_dataset(tiny_generator, tmp_path / "made", cases=4, layout="decathlon")
    made = read_dataset(tmp_path / "made")
    order = asked(tiny_generator, datasets=[made], stages=stages("supervised"), shares=[3, 1])
    plan = run(order, tmp_path / "out")
    assert [source.share for source in plan.sources] == [0.75, 0.25]
    assert plan.sources[0].kind == "dataset"
    assert plan.sources[0].synthetic == "tiny"
    record = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert "folder" not in record["sources"][0]

    images = asked(tiny_generator, datasets=[real], generators=[], stages=stages("masked"))
    plan = make_plan(images)
    assert plan.sources[0].kind == "dataset"
    assert plan.sources[0].cases == 6  # those of the split that train
    material = read_material(plan, [real], [], QUIET)
    known = {case.name for case in [*material.training[0], *material.held_out]}  # type: ignore[union-attr]
    assert known == {f"case_{n}" for n in range(6)}


def test_sources_that_do_not_belong_together(tiny_generator: Generator, tmp_path: Path) -> None:
    real = read_dataset(write_dataset(tmp_path / "real"))
    other = make_tiny_generator(labels={0: "background", 1: "liver"})
    with pytest.raises(LabelError, match="do not both know body, head, liver"):
        make_plan(asked(tiny_generator, generators=[tiny_generator, other]))
    with pytest.raises(DiffaugError, match=r"\[1, 2\] channels"):
        make_plan(asked(tiny_generator, generators=[tiny_generator, make_tiny_generator(channels=2)]))
    with pytest.raises(DiffaugError, match="nothing to pretrain on"):
        make_plan(asked(tiny_generator, generators=[]))
    with pytest.raises(DiffaugError, match="need 1 shares"):
        make_plan(asked(tiny_generator, shares=[0.5, 0.5]))
    with pytest.raises(DiffaugError, match="multiples of"):
        make_plan(asked(tiny_generator, patch=(16, 23, 16)))
    with pytest.raises(DiffaugError, match="sides of 1 voxel"):
        make_plan(asked(tiny_generator, patch=(0, 0, 0)))
    with pytest.raises(DiffaugError, match="low below high"):
        make_plan(asked(tiny_generator, window=(400.0, -100.0)))
    for wrong in ({"filters": 8}, {"filters": [4, 8]}):
        with pytest.raises(DiffaugError, match="dynunet cannot be built"):
            make_plan(asked(tiny_generator, network=NetworkPlan(settings=wrong)))
    images = read_dataset(tmp_path / "real", images=Path("images"))
    with pytest.raises(LabelError, match="has no labels"):
        make_plan(asked(tiny_generator, datasets=[images], generators=[]))
    assert real.labels


# -- nnU-Net -------------------------------------------------------------------------------------------------


def residual(folder: Path) -> NetworkPlan:
    """Plans with nnU-Net's residual encoder."""
    plan = nnunet_plans(
        folder,
        network_class_name="dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    )
    file = Path(plan.settings["plans"])
    content = json.loads(file.read_text())
    arguments = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    file.write_text(json.dumps(content))
    return plan


def with_geometry(plan: NetworkPlan) -> NetworkPlan:
    """What planning adds to the architecture."""
    file = Path(plan.settings["plans"])
    content = json.loads(file.read_text()) | {"transpose_forward": [1, 0, 2], "plans_name": "nnUNetPlans"}
    content["configurations"]["3d_fullres"] |= {"spacing": [2.0, 1.5, 1.0], "patch_size": [16, 24, 16]}
    file.write_text(json.dumps(content))
    return plan


@pytest.mark.parametrize("make", [nnunet_plans, residual])
def test_nnunet_loads_the_checkpoint(make: Any, tiny_generator: Generator, tmp_path: Path) -> None:
    """By its own function, into the network with deep supervision that it trains."""
    load = pytest.importorskip("nnunetv2.run.load_pretrained_weights").load_pretrained_weights
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network = with_geometry(make(tmp_path))
    plan = run(asked(tiny_generator, network=network, stages=stages("masked"), patch=None), tmp_path / "out")
    assert plan.space.orientation == ("A", "S", "R")
    assert plan.space.spacing == (2.0, 1.5, 1.0)
    architecture = json.loads(Path(network.settings["plans"]).read_text())["configurations"]["3d_fullres"][
        "architecture"
    ]
    trained = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        4,
        deep_supervision=True,
    )
    load(trained, str(tmp_path / "out" / "nnunet.pth"))
    weights = read_weights(tmp_path / "out")
    for name, parameter in trained.named_parameters():
        assert ("seg_layers" in name) == (name not in weights)
        if name in weights:
            assert torch.equal(parameter, weights[name])

    checkpoint = torch.load(tmp_path / "out" / "nnssl.pth", weights_only=True)
    assert set(checkpoint) == {"network_weights", "nnssl_adaptation_plan", "citations"}
    adaptation = checkpoint["nnssl_adaptation_plan"]
    json.dumps(adaptation)
    keys = checkpoint["network_weights"]
    for prefix in (adaptation["key_to_encoder"], adaptation["key_to_stem"], *adaptation["keys_to_in_proj"]):
        assert any(name.startswith(prefix) for name in keys)
    assert adaptation["key_to_lpe"] is None
    first = next(iter(adaptation["pretrain_plan"]["configurations"].values()))
    assert first["patch_size"] == [16, 24, 16]


@pytest.mark.slow
def test_two_processes_train_one_network(tiny_generator_folder: Path, tmp_path: Path) -> None:
    """As accelerate launches it, on the CPU."""
    output = tmp_path / "out"
    arguments = ["pretrain", "--generator", tiny_generator_folder, "--output", output, "--steps", "3"]
    arguments += ["--setting", "filters=[4,8,16]", "--patch", "16", "24", "16", "--device", "cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    process = subprocess.run(
        [
            *map(
                str,
                [*launcher, "--num_machines", "1", "--mixed_precision", "no", "-m", "diffaug", *arguments],
            )
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert read_weights(output)
