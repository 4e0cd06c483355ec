"""Networks by name: shapes, parts of their parameters, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaug.errors import DiffaugError
from diffaug.segmentation.networks import (
    NetworkPlan,
    build_network,
    check_patch,
    is_encoder,
    is_head,
    patch_multiple,
)

SMALL: dict[str, dict[str, Any]] = {
    "dynunet": {"filters": [4, 8, 16]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "unet": {"channels": [4, 8, 16], "num_res_units": 1},
    "swinunetr": {"feature_size": 12, "depths": [1, 1, 1, 1]},
}


def small(kind: str) -> NetworkPlan:
    return NetworkPlan.model_validate({"kind": kind, "settings": SMALL[kind]})


def nnunet_plans(folder: Path, **changes: Any) -> NetworkPlan:
    """A plans file with a small network of nnU-Net's."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 16],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 3,
            "strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    architecture["arch_kwargs"] |= changes.pop("arguments", {})
    configurations = {"3d_fullres": {"architecture": architecture | changes}}
    file = folder / "plans.json"
    file.write_text(json.dumps({"configurations": configurations}))
    return NetworkPlan(kind="nnunet", settings={"plans": str(file)})


@pytest.mark.parametrize("kind", SMALL)
def test_logits_have_the_shape_of_the_patch(kind: str) -> None:
    plan = small(kind)
    network = build_network(plan, 2, 3, seed=0)
    i, j, k = patch_multiple(plan)
    sides = (i, j, 2 * k)
    check_patch(plan, sides)
    for wrong in ((i, j, k), (i, j, k + 1)):
        with pytest.raises(DiffaugError, match="multiples of"):
            check_patch(plan, wrong)
    with torch.no_grad():
        assert network(torch.zeros(1, 2, *sides)).shape == (1, 3, *sides)
    first, again = (dict(build_network(plan, 2, 3, seed=0).named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", [*SMALL, "nnunet"])
def test_parts_are_told_apart(kind: str, tmp_path: Path) -> None:
    """Networks of other classes differ in their heads alone; of other channels in their encoders."""
    plan = nnunet_plans(tmp_path) if kind == "nnunet" else small(kind)
    shapes = [
        {name: p.shape for name, p in build_network(plan, channels, classes).named_parameters()}
        for channels, classes in ((1, 3), (1, 5), (2, 3))
    ]
    heads = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert heads
    assert heads <= {name for name in shapes[0] if is_head(plan, name)}
    first = {name for name in shapes[0] if shapes[0][name] != shapes[2][name]}
    if kind != "swinunetr":  # which has a second stem beside its encoder
        assert first <= {name for name in shapes[0] if is_encoder(plan, name)}
    assert not any(is_head(plan, name) and is_encoder(plan, name) for name in shapes[0])
    share = sum(is_encoder(plan, name) for name in shapes[0]) / len(shapes[0])
    assert 0.2 < share < 0.9


def test_networks_of_plans_are_built_as_nnunet_builds_them(tmp_path: Path) -> None:
    plan = nnunet_plans(tmp_path)
    network = build_network(plan, 1, 2)
    assert type(network).__name__ == "PlainConvUNet"
    assert patch_multiple(plan) == (2, 4, 4)
    assert network(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"network_class_name": "os.system"}, "os.system"),
        ({"arguments": {"nonlin": "subprocess.Popen"}}, "subprocess.Popen"),
        ({"arguments": {"norm_op": "torch.nn.Module.__init__"}}, "torch.nn.Module.__init__"),
    ],
)
def test_plans_cannot_name_what_they_like(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    plan = nnunet_plans(tmp_path, **change)
    with pytest.raises(DiffaugError, match=named):
        build_network(plan, 1, 2)


def test_plans_without_the_configuration_are_refused(tmp_path: Path) -> None:
    plan = nnunet_plans(tmp_path)
    other = plan.model_copy(update={"settings": plan.settings | {"configuration": "3d_lowres"}})
    with pytest.raises(DiffaugError, match=r"3d_lowres.*3d_fullres"):
        build_network(other, 1, 2)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(DiffaugError, match=r"dynunet has no setting depth; it has filters"):
        build_network(NetworkPlan(settings={"depth": 3}), 1, 2)
    with pytest.raises(DiffaugError, match="cannot be built"):
        build_network(NetworkPlan(kind="swinunetr", settings={"feature_size": 7}), 1, 2)
