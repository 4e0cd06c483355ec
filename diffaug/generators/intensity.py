"""Intensity conventions: from a volume's own units to about [-1, 1] and back."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor


class IntensityConvention(BaseModel):
    """How intensities of each channel map onto network units.

    `percentile`: each volume's own `low` and `high` percentiles (of the whole volume, constant padding
    masked) become -1 and 1: for arbitrary units such as MR. `window`: the fixed values `windows[channel]` do:
    for calibrated units such as HU. Values beyond `clip` network units are clipped. `typical` gives, per
    channel, the values (in data units) of -1 and 1 that a volume made from nothing gets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["percentile", "window"]
    low: float = Field(default=0.5, ge=0, lt=50)
    high: float = Field(default=99.5, gt=50, le=100)
    clip: float = Field(default=1.5, ge=1)
    windows: list[tuple[float, float]] = []
    typical: list[tuple[float, float]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("windows", "typical"):
            for low, high in getattr(self, name):
                if not low < high:
                    raise ValueError(
                        f"{name} must hold pairs (low, high) with low < high, got ({low}, {high})"
                    )
        expected = len(self.typical) if self.kind == "window" else 0
        if len(self.windows) != expected:
            raise ValueError(f"kind {self.kind!r} needs {expected} windows, got {len(self.windows)}")
        return self


@dataclass(frozen=True)
class IntensityMap:
    """The map of one volume, float64 tensors `(C,)`: the data values that become -1 (`low`) and 1 (`high`),
    and the smallest one (`floor`), below which no made value falls: magnitude images do not turn negative."""

    low: Tensor
    high: Tensor
    floor: Tensor
    clip: float

    def normalise(self, volume: Tensor) -> Tensor:
        """`(..., C, I, J, K)` in data units to network units, clipped, float32."""
        scale = _spatial(self.high - self.low)
        volume = (volume.double() - _spatial(self.low)) / scale * 2 - 1
        return volume.clamp(-self.clip, self.clip).float()

    def denormalise(self, volume: Tensor) -> Tensor:
        """`(..., C, I, J, K)` in network units, clipped, to data units, float64."""
        volume = (volume.double().clamp(-self.clip, self.clip) + 1) / 2
        return self.bound(volume * _spatial(self.high - self.low) + _spatial(self.low))

    def denormalise_difference(self, difference: Tensor) -> Tensor:
        """A difference of two volumes `(..., C, I, J, K)` in network units to data units, float64."""
        return difference.double() / 2 * _spatial(self.high - self.low)

    def with_floor_of(self, volume: Tensor) -> "IntensityMap":
        """This map with a floor that nothing in the volume `(C, I, J, K)` lies below."""
        smallest = self.floor.new_tensor([float(_array(channel).min()) for channel in volume])
        return replace(self, floor=torch.minimum(self.floor, smallest))

    def bound(self, volume: Tensor) -> Tensor:
        """`(..., C, I, J, K)` in data units, raised to `floor` where it is lower."""
        return torch.maximum(volume, _spatial(self.floor))


def fit_intensity_map(volume: Tensor, convention: IntensityConvention) -> IntensityMap:
    """The intensity map of the whole volume `(C, I, J, K)` of any real dtype, not of a random patch of it."""
    lows, highs, floors = [], [], []
    for index, channel in enumerate(volume):
        values = _array(channel)
        floors.append(float(values.min()))
        if convention.kind == "window":
            low, high = convention.windows[index]
        else:
            low, high = _range(trim_padding(values), convention)
        lows.append(low)
        highs.append(high)
    low, high, floor = torch.tensor([lows, highs, floors], dtype=torch.float64, device=volume.device)
    return IntensityMap(low, high, floor, convention.clip)


def typical_map(convention: IntensityConvention) -> IntensityMap:
    """The map for a volume made from nothing; where units are arbitrary and typically positive (MR), it does
    not fall below 0."""
    low, high = torch.tensor(convention.typical, dtype=torch.float64).T
    magnitude = (low >= 0) & (convention.kind == "percentile")
    return IntensityMap(low, high, torch.where(magnitude, 0.0, -torch.inf), convention.clip)


def trim_padding(volume: NDArray[Any]) -> NDArray[Any]:
    """`(I, J, K)` without the outer slices that are constant (padding), unless all are."""
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        varied = np.flatnonzero(volume.max(axis=others) > volume.min(axis=others))
        if len(varied) == 0:
            return volume
        volume = volume[(slice(None),) * axis + (slice(varied[0], varied[-1] + 1),)]
    return volume


def _range(values: NDArray[Any], convention: IntensityConvention) -> tuple[float, float]:
    # By hand: numpy.percentile overflows where narrow integers lie far apart.
    positions = np.array([convention.low, convention.high]) / 100 * (values.size - 1)
    ranks = np.unique([np.floor(positions), np.ceil(positions)]).astype(int)
    ordered = np.partition(values, ranks, axis=None)[ranks].astype(float)
    low, high = (float(v) for v in np.interp(positions, ranks, ordered))
    if not high > low:
        # A (nearly) binary or constant channel: fall back on its range, and on 1 where that is empty.
        low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1


def _array(volume: Tensor) -> NDArray[Any]:
    """The tensor as an array in its own dtype; half precision as float32."""
    if volume.dtype in (torch.float16, torch.bfloat16):
        volume = volume.float()
    return volume.cpu().numpy()


def _spatial(values: Tensor) -> Tensor:
    """`(C,)` to `(C, 1, 1, 1)`."""
    return values[:, None, None, None]
