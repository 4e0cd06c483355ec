"""MONAI's networks with a user's weights, which nothing but tensors is read from."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffaug.audit.networks import load_network
from diffaug.errors import DiffaugError

nets = pytest.importorskip("monai.networks.nets")

VOLUMES = torch.randn(2, 1, 16, 16, 8, generator=torch.Generator().manual_seed(0))


def resnet(name: str = "resnet10", channels: int = 1, **options: Any) -> nn.Module:
    """A network with random weights and statistics, in evaluation mode."""
    torch.manual_seed(1)
    network = getattr(nets, name)(spatial_dims=3, n_input_channels=channels, **options)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return network.eval()


def features(network: nn.Module, volumes: torch.Tensor = VOLUMES) -> torch.Tensor:
    """What a network gives without its head."""
    network.fc = None
    with torch.no_grad():
        return network(volumes).flatten(1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_heads_are_taken_off(tmp_path: Path, prefix: str) -> None:
    network = resnet(num_classes=3)
    state = {prefix + key: value for key, value in network.state_dict().items()}
    assert f"{prefix}fc.weight" in state
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "weights.pth")
    loaded = load_network("resnet10", tmp_path / "weights.pth")
    with torch.no_grad():
        found = loaded(VOLUMES)
    assert found.shape == (2, 512)
    assert torch.equal(found, features(network))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"shortcut_type": "A"}),
        ("resnet50", {"bias_downsample": True}),
        ("resnet10", {"channels": 3, "conv1_t_size": 3}),
    ],
)
def test_variants_are_known_by_their_weights(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    network = resnet(name, **options)
    file = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), file)
    volumes = torch.randn(1, options.get("channels", 1), 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_network(name, file)(volumes).flatten(1), features(network, volumes))


def test_a_bare_state_dict_is_read(tmp_path: Path) -> None:
    network = resnet(feed_forward=False)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        assert torch.equal(load_network("resnet10", tmp_path / "weights.pt")(VOLUMES), features(network))


def test_unknown_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match="no network 'densenet'; there are resnet10, resnet18"):
        load_network("densenet", tmp_path / "weights.pt")


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(resnet("resnet18").state_dict(), tmp_path / "eighteen.pt")
    with pytest.raises(DiffaugError, match=r"eighteen\.pt does not fit MONAI's resnet10"):
        load_network("resnet10", tmp_path / "eighteen.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer": torch.zeros(3)}, "holds no 3D ResNet"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, "no conv1.weight of five axes"),
        ({"state_dict": {"conv1.weight": "seven"}}, "holds no state dict"),
        ([torch.zeros(3)], "holds no state dict"),
    ],
)
def test_files_that_hold_no_resnet_are_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(DiffaugError, match=rf"other\.pt.*{message}"):
        load_network("resnet10", tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors", "missing.pt"])
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    if "missing" not in name:
        (tmp_path / name).write_bytes(b"neither weights nor a pickle")
    with pytest.raises(DiffaugError, match=f"{name} cannot be read as weights"):
        load_network("resnet10", tmp_path / name)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, save: str) -> None:
    file, touched = tmp_path / "weights.pt", tmp_path / "touched"
    state = resnet().state_dict() | {"extra": Touch(touched)}
    if save == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(DiffaugError, match=r"weights\.pt cannot be read as weights"):
        load_network("resnet10", file)
    assert not touched.exists()
