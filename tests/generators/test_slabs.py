"""MONAI's autoencoders in slabs compute what they compute at once."""

from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL

from diffaug.generators.latent_diffusion import slabs

SIZES: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 2,
    "out_channels": 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "attention_levels": (False, False, False),
}


@pytest.mark.parametrize("voxels", [1, 500, 1500, 10**6])
@pytest.mark.parametrize("shape", [(24, 16, 12), (8, 12, 20), (4, 4, 4), (20, 8, 8)])
@pytest.mark.parametrize("maisi", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_slabs_change_nothing(
    voxels: int, shape: tuple[int, int, int], maisi: bool, attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"with_encoder_nonlocal_attn": attention, "with_decoder_nonlocal_attn": attention}
    torch.manual_seed(0)
    if maisi:
        network: Any = AutoencoderKlMaisi(
            **SIZES, **more, num_channels=(4, 8, 8), num_res_blocks=(1, 2, 1), num_splits=1, save_mem=False
        )
    else:
        network = AutoencoderKL(**SIZES, **more, channels=(4, 8, 8), num_res_blocks=(1, 2, 1))
    network.eval()
    monkeypatch.setattr(slabs, "SLAB_VOXELS", voxels)
    image = torch.randn(2, 2, *shape)
    latent = torch.randn(2, 3, *(n // 4 for n in shape))
    given = image.clone(), latent.clone()
    with torch.no_grad():
        expected = network.encode(image)[0], network.decode(latent)
        found = slabs.encode(network, image), slabs.decode(network, latent)
    assert torch.equal(image, given[0])
    assert torch.equal(latent, given[1])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-5 * float(other.abs().max()), rtol=1e-4)
