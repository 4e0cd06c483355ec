import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from diffaug.generators.intensity import (
    IntensityConvention,
    fit_intensity_map,
    trim_padding,
    typical_map,
)

PERCENTILE = IntensityConvention(kind="percentile", typical=[(0.0, 100.0)])
HOUNSFIELD = IntensityConvention(
    kind="window", windows=[(-160.0, 240.0)], typical=[(-160.0, 240.0)], clip=1.0
)


def textured(shape: tuple[int, int, int] = (9, 8, 7), seed: int = 0) -> Tensor:
    return (
        torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50 + 300
    )


@given(
    low=st.floats(0, 49),
    high=st.floats(51, 100),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    seed=st.integers(0, 99),
)
def test_percentiles_are_numpys(low: float, high: float, shape: tuple[int, int, int], seed: int) -> None:
    volume = textured(shape, seed)
    if volume.numel() < 2:
        return
    convention = IntensityConvention(kind="percentile", low=low, high=high, typical=[(0.0, 1.0)])
    found = fit_intensity_map(volume, convention)
    expected = np.percentile(volume.numpy(), [low, high])
    assert [found.low.item(), found.high.item()] == pytest.approx(list(expected), rel=1e-9)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.float16, torch.bfloat16]
)
def test_every_dtype_is_mapped_as_its_values(dtype: torch.dtype) -> None:
    volume = torch.arange(210).remainder(101).view(1, 5, 6, 7).to(dtype)
    found = fit_intensity_map(volume, PERCENTILE)
    expected = fit_intensity_map(volume.double(), PERCENTILE)
    assert (found.low, found.high, found.floor) == (expected.low, expected.high, expected.floor)
    assert torch.equal(found.normalise(volume), expected.normalise(volume.double()))


def test_percentiles_of_narrow_integers_do_not_overflow() -> None:
    volume = torch.full((1, 4, 4, 4), -30000, dtype=torch.int16)
    volume[..., 1::2] = 30000
    convention = IntensityConvention(kind="percentile", low=49.5, high=50.5, typical=[(0.0, 1.0)])
    found = fit_intensity_map(volume, convention)
    assert -30000 <= found.low < 0 < found.high <= 30000


def test_the_percentiles_become_minus_one_and_one() -> None:
    volume = textured()
    found = fit_intensity_map(volume, PERCENTILE)
    low, high = np.percentile(volume.numpy(), [0.5, 99.5])
    points = torch.tensor([low, (low + high) / 2, high]).view(1, 3, 1, 1)
    assert found.normalise(points).flatten().tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


def test_constant_padding_does_not_count() -> None:
    volume = textured()
    padded = torch.nn.functional.pad(volume, (5, 30, 0, 8, 11, 2), value=-1000.0)
    found, expected = fit_intensity_map(padded, PERCENTILE), fit_intensity_map(volume, PERCENTILE)
    assert (found.low, found.high) == (expected.low, expected.high)
    assert torch.equal(torch.from_numpy(trim_padding(padded[0].numpy())), volume[0])


def test_background_that_is_not_padding_counts() -> None:
    """Constant voxels beside the object on the same slices are part of the volume."""
    volume = torch.zeros(1, 8, 8, 8)
    volume[0, 0, 0, 0] = volume[0, 7, 7, 7] = 1.0
    volume[0, 2:4, 2:4, 2:4] = 10.0
    assert trim_padding(volume[0].numpy()).shape == (8, 8, 8)


def test_a_ramp_is_not_taken_for_padding() -> None:
    """All slices across the ramp are constant."""
    ramp = torch.arange(100.0).view(1, 100, 1, 1).expand(1, 100, 5, 6)
    found = fit_intensity_map(ramp, PERCENTILE)
    assert found.low.item() == pytest.approx(0.5, abs=0.5)
    assert found.high.item() == pytest.approx(98.5, abs=0.5)


def test_channels_have_their_own_maps() -> None:
    volume = torch.cat([textured(seed=1), 1000 * textured(seed=2)])
    found = fit_intensity_map(volume, IntensityConvention(kind="percentile", typical=[(0, 1), (0, 1)]))
    for channel in range(2):
        alone = fit_intensity_map(volume[channel : channel + 1], PERCENTILE)
        assert found.low[channel] == alone.low[0]
        assert found.high[channel] == alone.high[0]


@pytest.mark.parametrize("value", [0.0, -7.5, 1e9, 1e12])
def test_constant_volumes_stay_finite_and_come_back(value: float) -> None:
    volume = torch.full((1, 4, 5, 6), value, dtype=torch.float64)
    found = fit_intensity_map(volume, PERCENTILE)
    normalised = found.normalise(volume)
    assert torch.equal(normalised, torch.full_like(normalised, -1))
    assert torch.equal(found.denormalise(normalised), volume)


def test_a_nearly_binary_volume_uses_its_range() -> None:
    volume = torch.zeros(1, 20, 20, 20)
    volume[0, 0, 0, 0] = volume[0, -1, -1, -1] = 4.0
    found = fit_intensity_map(volume, PERCENTILE)
    assert (found.low.item(), found.high.item()) == (0.0, 4.0)


def test_a_narrow_range_far_from_zero_keeps_its_resolution() -> None:
    volume = 1e9 + torch.arange(125.0, dtype=torch.float64).view(1, 5, 5, 5)
    found = fit_intensity_map(volume, PERCENTILE)
    normalised = found.normalise(volume)
    assert len(normalised.unique()) == 125
    assert torch.allclose(found.denormalise(normalised), volume, rtol=0, atol=1e-4)


def test_round_trip_within_the_clip() -> None:
    volume = textured()
    found = fit_intensity_map(volume, PERCENTILE)
    inside = (volume >= found.low - 0.25 * (found.high - found.low)) & (
        volume <= found.high + 0.25 * (found.high - found.low)
    )
    assert inside.double().mean() > 0.9
    back = found.denormalise(found.normalise(volume))
    assert torch.allclose(back[inside], volume[inside], rtol=1e-5)
    assert found.normalise(volume * 100).abs().max() == PERCENTILE.clip


def test_nothing_made_falls_below_the_volumes_own_minimum() -> None:
    volume = textured().abs()
    found = fit_intensity_map(volume, PERCENTILE)
    made = found.denormalise(torch.full_like(volume, -PERCENTILE.clip))
    assert made.min().item() == volume.min().item()
    assert found.bound(volume - 1e6).max().item() == volume.min().item()


def test_hounsfield_windows_are_fixed() -> None:
    volume = torch.tensor([-1000, -160, 40, 240, 3000], dtype=torch.int16).view(1, 5, 1, 1)
    found = fit_intensity_map(volume, HOUNSFIELD)
    assert found.normalise(volume).flatten().tolist() == pytest.approx([-1, -1, 0, 1, 1])
    assert found.denormalise(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(40)


def test_a_difference_scales_without_shift() -> None:
    found = fit_intensity_map(textured(), PERCENTILE)
    one = torch.ones(1, 2, 2, 2)
    change = found.denormalise_difference(one)
    expected = found.denormalise(0.5 * one) - found.denormalise(-0.5 * one)
    assert torch.allclose(change, expected)
    assert torch.equal(found.denormalise_difference(0 * one), torch.zeros_like(change))


def test_typical_units() -> None:
    found = typical_map(IntensityConvention(kind="percentile", typical=[(10.0, 30.0), (0.0, 1.0)]))
    volume = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert found.denormalise(volume).flatten().tolist() == pytest.approx([10.0, 1.0])
    # Magnitude images do not turn negative, calibrated ones may.
    assert found.denormalise(torch.full((2, 1, 1, 1), -1.5)).flatten().tolist() == pytest.approx([5.0, 0.0])
    assert typical_map(HOUNSFIELD).denormalise(torch.full((1, 1, 1, 1), -1.0)).item() == -160
    # A batch of volumes too.
    assert found.denormalise(volume[None].expand(3, 2, 1, 1, 1)).shape == (3, 2, 1, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "percentile", "typical": [(1.0, 1.0)]}, "typical must hold pairs"),
        ({"kind": "window", "typical": [(0.0, 1.0)]}, "needs 1 windows, got 0"),
        ({"kind": "percentile", "typical": [(0.0, 1.0)], "windows": [(0.0, 1.0)]}, "needs 0 windows"),
        ({"kind": "window", "typical": [(0.0, 1.0)], "windows": [(5.0, 1.0)]}, "windows must hold pairs"),
        ({"kind": "percentile", "typical": [(0.0, 1.0)], "low": 60}, "less than 50"),
        ({"kind": "zscore", "typical": [(0.0, 1.0)]}, "kind"),
    ],
)
def test_impossible_conventions_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IntensityConvention.model_validate(wrong)
