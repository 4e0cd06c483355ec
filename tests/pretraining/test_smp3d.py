"""Encoders of segmentation-models-pytorch-3d, which has an environment of its own in .ci/run."""

from pathlib import Path

import pytest
import torch

from diffaug.generators.generator import Generator
from diffaug.segmentation.networks import NetworkPlan, build_network, is_encoder, is_head
from tests.pretraining.test_pretrain import asked, run, stages

smp = pytest.importorskip(
    "segmentation_models_pytorch_3d", reason="needs segmentation-models-pytorch-3d: pip install '.[smp3d]'"
)
PLAN = NetworkPlan(kind="smp3d", settings={"encoder": "resnet18"})


def test_the_encoder_is_loaded_whole(tiny_generator: Generator, tmp_path: Path) -> None:
    run(
        asked(tiny_generator, network=PLAN, stages=stages("masked", "supervised"), patch=(32, 32, 64)),
        tmp_path / "out",
    )
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=7)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    state = torch.load(tmp_path / "out" / "smp3d_encoder.pt", weights_only=True)
    model.encoder.load_state_dict(state)
    after = model.encoder.state_dict()
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert model(torch.zeros(2, 1, 32, 32, 64)).shape == (2, 7, 32, 32, 64)


def test_parts_are_told_apart() -> None:
    one, other = (dict(build_network(PLAN, 1, classes).named_parameters()) for classes in (2, 5))
    heads = {name for name in one if one[name].shape != other[name].shape}
    assert heads
    assert all(is_head(PLAN, name) for name in heads)
    assert is_encoder(PLAN, "encoder.conv1.weight")
