"""Multi-scale structural similarity against closed forms and MONAI."""

import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric

from diffaug.errors import DiffaugError
from diffaug.evaluation.structure import EXPONENTS, ms_ssim


def test_a_volume_is_like_itself_alone() -> None:
    x = torch.rand(2, 1, 32, 28, 30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ms_ssim(x, x, data_range=1), torch.ones(2, dtype=torch.float64))
    assert (ms_ssim(x, x.flip(2), data_range=1) < 0.5).all()


def test_constant_volumes_differ_in_luminance_at_the_coarsest_scale() -> None:
    a, b = torch.full((1, 1, 28, 28, 28), 0.3), torch.full((1, 1, 28, 28, 28), 0.8)
    luminance = (2 * 0.3 * 0.8 + 1e-4) / (0.3**2 + 0.8**2 + 1e-4)
    weight = EXPONENTS[2] / sum(EXPONENTS[:3])
    assert ms_ssim(a, b, data_range=1).item() == pytest.approx(luminance**weight, rel=1e-6)


def test_it_is_monais_where_that_has_the_same_settings() -> None:
    random = torch.Generator().manual_seed(1)
    a = torch.rand(2, 1, 32, 32, 32, generator=random)
    b = (a + 0.2 * torch.randn(a.shape, generator=random)).clamp(0, 1)
    weights = [e / sum(EXPONENTS[:3]) for e in EXPONENTS[:3]]
    metric = MultiScaleSSIMMetric(
        spatial_dims=3, data_range=1.0, kernel_size=7, kernel_sigma=1.5, weights=weights
    )
    expected = metric(a, b).flatten().double()
    assert torch.allclose(ms_ssim(a, b, data_range=1), expected, atol=2e-3)


def test_volumes_too_small_for_the_coarsest_scale_are_refused() -> None:
    x = torch.zeros(1, 1, 27, 40, 40)
    with pytest.raises(DiffaugError, match="need 28 voxels on each axis"):
        ms_ssim(x, x, data_range=1)
