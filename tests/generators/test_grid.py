"""Ways onto the grid and back, for volumes of any orientation, spacing and size."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.generators.grid import RIM, Grid, Placement, bounding_box, place

Affine = NDArray[np.float64]
Triple = tuple[int, int, int]

GRID = Grid(("R", "A", "S"), (1.5, 1.0, 2.0), (10, 14, 8))
ALL_CODES = [
    tuple(pair[side] for pair, side in zip(order, sides, strict=True))
    for order in permutations(("LR", "PA", "IS"))
    for sides in product((0, 1), repeat=3)
]


def axis_aligned(codes: tuple[str, ...], spacing: tuple[float, ...], origin: tuple[float, ...]) -> Affine:
    """Voxel to world (mm, RAS+), written out from the meaning of the axis codes."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world = ["LR", "PA", "IS"].index(next(pair for pair in ("LR", "PA", "IS") if code in pair))
        affine[world, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    affine[:3, 3] = origin
    return affine


def rotated(affine: Affine, degrees: tuple[float, ...]) -> Affine:
    """The volume turned about the world's axes."""
    turn = np.eye(4)
    for (a, b), angle in zip(((1, 2), (0, 2), (0, 1)), np.deg2rad(degrees), strict=True):
        step = np.eye(4)
        step[[a, b], [a, b]] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn @ affine


def world_coordinates(shape: tuple[int, ...], affine: Affine) -> NDArray[np.float64]:
    """Of every voxel, mm, `(3, I, J, K)`."""
    voxels = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ voxels + affine[:3, 3:]).reshape(3, *shape)


def centre_of(shape: tuple[int, ...], affine: Affine) -> NDArray[np.float64]:
    return affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]


def box_around(voxel: tuple[int, ...], reach: int = 1) -> tuple[tuple[int, int], ...]:
    return tuple((v - reach, v + reach + 1) for v in voxel)


codes = st.sampled_from(ALL_CODES)
spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)
# From a single voxel to many times the grid.
shapes = st.tuples(*[st.integers(1, 36)] * 3)
origins = st.tuples(*[st.floats(-200, 200)] * 3)
angles = st.tuples(*[st.floats(-20, 20)] * 3)


@st.composite
def placements(
    draw: st.DrawFn, spacing: st.SearchStrategy[tuple[float, ...]] = spacings
) -> tuple[Placement, Affine]:
    """A volume of any orientation (oblique too), spacing and size on a grid of any orientation."""
    grid = Grid(draw(codes), (1.5, 1.0, 2.0), (10, 7, 12))
    shape = draw(shapes)
    affine = rotated(axis_aligned(draw(codes), draw(spacing), draw(origins)), draw(angles))
    middle = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return place(grid, shape, affine, box=box_around(middle, 0)), affine


def source_shape(placement: Placement) -> Triple:
    """Of the volume as it was given."""
    shape = [0, 0, 0]
    for axis, size in zip(placement.axes, placement.source_shape, strict=True):
        shape[axis] = size
    return shape[0], shape[1], shape[2]


# -- the grid itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ALL_CODES, ids="".join)
def test_the_grids_affine_has_its_orientation_spacing_and_centre(orientation: tuple[str, str, str]) -> None:
    grid = Grid(orientation, (0.7, 1.2, 3.0), (5, 8, 3))
    assert nib.aff2axcodes(grid.affine) == orientation
    assert nib.affines.voxel_sizes(grid.affine) == pytest.approx(grid.spacing)
    assert centre_of(grid.shape, grid.affine) == pytest.approx([0, 0, 0])
    assert grid.affine[3].tolist() == [0, 0, 0, 1]


# -- reorientation -------------------------------------------------------------------------------------------


@given(found=placements())
@settings(max_examples=60, deadline=None)
def test_reorientation_agrees_with_nibabel(found: tuple[Placement, Affine]) -> None:
    placement, affine = found
    volume = np.arange(np.prod(source_shape(placement))).reshape(source_shape(placement))
    transform = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(placement.grid.orientation)
    )
    expected = nib.orientations.apply_orientation(volume, transform)
    reoriented = placement.reorient(torch.from_numpy(volume))
    assert np.array_equal(reoriented.numpy(), expected)
    assert reoriented.shape == placement.source_shape
    assert np.array_equal(placement.restore(reoriented).numpy(), volume)


@given(found=placements())
@settings(max_examples=40, deadline=None)
def test_take_and_put_back_are_the_reoriented_window(found: tuple[Placement, Affine]) -> None:
    placement, _ = found
    volume = torch.arange(2 * int(np.prod(placement.source_shape))).view(2, *source_shape(placement))
    window = placement.window()
    part = placement.take(volume, window)
    assert torch.equal(part, placement.reorient(volume)[:, *(slice(a, b) for a, b in window)])
    canvas = torch.full_like(volume, -1)
    placement.put_back(canvas, part, window)
    written = canvas >= 0
    assert torch.equal(canvas[written], volume[written])
    assert int(written.sum()) == part.numel()


# -- where a volume comes to lie -----------------------------------------------------------------------------


@given(found=placements())
@settings(max_examples=100, deadline=None)
def test_short_axes_are_covered_whole_and_long_ones_hold_the_grid(found: tuple[Placement, Affine]) -> None:
    placement, _ = found
    for axis, (start, stop) in enumerate(placement.window()):
        size, ratio = placement.source_shape[axis], placement.ratio[axis]
        length = placement.grid.shape[axis] * ratio
        low = placement.offset[axis] - ratio / 2
        if size > length + 1e-6:
            assert low >= -0.5 - 1e-6
            assert low + length <= size - 0.5 + 1e-6
            assert abs(stop - start - length) < 1
        else:
            assert (start, stop) == (0, size)


@given(source=codes, target=codes, spacing=spacings, shape=shapes, origin=origins)
@settings(max_examples=60, deadline=None)
def test_world_coordinates_land_on_the_right_voxels(
    source: tuple[str, str, str],
    target: tuple[str, str, str],
    spacing: tuple[float, ...],
    shape: Triple,
    origin: tuple[float, ...],
) -> None:
    """A field that is linear in world coordinates is resampled to the world coordinates of the grid's voxels.

    The grid is large enough for the volume, so their centres coincide: to half a voxel where voxels are
    copied, also where they are up to 1 % longer or shorter than the grid's.
    """
    grid = Grid(target, (1.5, 1.0, 2.0), (16, 18, 14))
    to_grid_axis = {
        c: n for n, pair in enumerate(target) for c in next(p for p in ("LR", "PA", "IS") if pair in p)
    }
    room = [grid.shape[to_grid_axis[c]] * grid.spacing[to_grid_axis[c]] for c in source]
    shape = tuple(int(max(1, min(n, r // s))) for n, r, s in zip(shape, room, spacing, strict=True))
    affine = axis_aligned(source, spacing, origin)
    placement = place(grid, shape, affine)
    field = world_coordinates(shape, affine) - centre_of(shape, affine)[:, None, None, None]
    found = placement.to_grid(torch.from_numpy(field)[None])[0].numpy()
    expected = world_coordinates(grid.shape, grid.affine)
    # Blur and mirroring bend the field near the volume's border.
    half_extent = np.abs(affine[:3, :3]) @ ((np.array(shape) - 1) / 2)
    reach = np.abs(grid.affine[:3, :3]) @ np.full(3, 1.5) + np.abs(affine[:3, :3]) @ np.full(3, 1.0)
    near = np.abs(expected) > (half_extent - reach)[:, None, None, None]
    error = np.abs(found - expected)
    for world in range(3):
        if not near[world].all():
            axis = int(np.argmax(np.abs(grid.affine[world, :3])))
            allowed = 1e-3
            if placement.ratio[axis] == 1.0:
                allowed += grid.spacing[axis] / 2 + 0.01 * half_extent[world]
            assert error[world][~near[world]].max() <= allowed


def test_a_landmark_lands_where_its_coordinates_say() -> None:
    """A voxel at +6 mm R, -4 mm A, +2 mm S of the centre of an LPI scan, by hand."""
    shape = (21, 25, 13)
    affine = axis_aligned(("L", "P", "I"), (1.0, 1.0, 2.0), (100.0, -30.0, 7.0))
    landmark = np.linalg.solve(affine, [*(centre_of(shape, affine) + np.array([6.0, -4.0, 2.0])), 1.0])[
        :3
    ].round()
    volume = torch.zeros(1, 1, *shape)
    volume[0, 0, *landmark.astype(int)] = 1.0
    grid = Grid(("R", "A", "S"), (1.0, 1.0, 2.0), (31, 27, 15))
    on_grid = place(grid, shape, affine).to_grid(volume)[0, 0]
    peak = np.unravel_index(int(on_grid.argmax()), grid.shape)
    assert (grid.affine @ [*peak, 1.0])[:3] == pytest.approx([6, -4, 2])
    assert on_grid.max() == 1.0


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [9, 10, 11])
def test_both_orientations_of_one_volume_give_the_same_grid_volume(flip: bool, size: int) -> None:
    volume = torch.randn(1, 1, size, 14, 8)
    right = axis_aligned(("R", "A", "S"), (1.5, 1.0, 2.0), (0.0, 0.0, 0.0))
    left = axis_aligned(("L", "A", "S"), (1.5, 1.0, 2.0), (0.0, 0.0, 0.0))
    expected = place(GRID, (size, 14, 8), right).to_grid(volume)
    assert torch.equal(place(GRID, (size, 14, 8), left).to_grid(volume.flip(2)), expected)


def test_oblique_volumes_keep_their_own_axes() -> None:
    straight = axis_aligned(("L", "S", "P"), (1.2, 0.8, 3.0), (5.0, 6.0, 7.0))
    expected = place(GRID, (12, 13, 5), straight)
    found = place(GRID, (12, 13, 5), rotated(straight, (12.0, -15.0, 8.0)))
    assert (found.axes, found.flips) == (expected.axes, expected.flips)
    assert found.ratio == pytest.approx(expected.ratio)
    assert found.offset == pytest.approx(expected.offset)


@pytest.mark.parametrize("spacing", [(1.5, 1.0, 2.0), (0.6, 0.4, 0.9), (2.5, 1.7, 3.0)])
@pytest.mark.parametrize("orientation", [("R", "A", "S"), ("L", "P", "I"), ("S", "L", "A")])
def test_a_larger_scan_is_worked_on_around_the_box_or_the_label(
    spacing: tuple[float, ...], orientation: tuple[str, ...]
) -> None:
    shape = (90, 100, 95)
    affine = axis_aligned(orientation, spacing, (0.0, 0.0, 0.0))
    middle = (40, 55, 47)
    label = torch.zeros(shape, dtype=torch.bool)
    label[39:42, 53:58, 47] = True
    by_label = place(GRID, shape, affine, foreground=label)
    assert by_label == place(GRID, shape, affine, box=((39, 42), (53, 58), (47, 48)))
    for n, axis in enumerate(by_label.axes):
        centre = shape[axis] - 1 - middle[axis] if by_label.flips[n] else middle[axis]
        found = by_label.offset[n] + (GRID.shape[n] - 1) / 2 * by_label.ratio[n]
        assert found == pytest.approx(centre, abs=0.5 if by_label.ratio[n] == 1.0 else 1e-6)


@pytest.mark.parametrize("corner", [(0, 0, 0), (89, 99, 94)])
@pytest.mark.parametrize("spacing", [(1.5, 1.0, 2.0), (0.7, 0.6, 0.9)])
def test_a_box_at_the_edge_keeps_the_grid_inside_the_scan(corner: Triple, spacing: tuple[float, ...]) -> None:
    placement = place(
        GRID, (90, 100, 95), axis_aligned(("R", "A", "S"), spacing, (0, 0, 0)), box=box_around(corner, 0)
    )
    for axis, (start, stop) in enumerate(placement.window()):
        size = placement.source_shape[axis]
        assert (start == 0) if corner[axis] == 0 else (stop == size)
        # Nothing is mirrored: the outermost voxels of the grid lie in the scan.
        assert placement.offset[axis] - placement.ratio[axis] / 2 >= -0.5 - 1e-9
        last = placement.offset[axis] + (GRID.shape[axis] - 0.5) * placement.ratio[axis]
        assert last <= size - 0.5 + 1e-9


def test_a_slightly_longer_volume_is_cut_about_its_centre_and_a_larger_scan_is_refused() -> None:
    affine = axis_aligned(("R", "A", "S"), GRID.spacing, (0, 0, 0))
    assert place(GRID, (12, 16, 10), affine).window() == [(1, 11), (1, 15), (1, 9)]
    with pytest.raises(
        DiffaugError, match=r"axis 1 is 18 mm long.*object of 14 mm: give the object's label map.*or box="
    ):
        place(GRID, (12, 18, 10), affine)
    # An empty label map does not say where the object lies.
    with pytest.raises(DiffaugError, match="give the object's label map"):
        place(GRID, (12, 18, 10), affine, foreground=torch.zeros(12, 18, 10, dtype=torch.bool))


@pytest.mark.parametrize(
    "box",
    [
        ((0, 5), (0, 5), (8, 11)),
        ((-1, 5), (0, 5), (0, 5)),
        ((5, 5), (0, 5), (0, 5)),
        ((6, 5), (0, 5), (0, 5)),
    ],
)
def test_a_box_outside_the_volume_is_refused(box: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(DiffaugError, match=r"does not lie in the volume of shape \(12, 16, 10\): axis"):
        place(GRID, (12, 16, 10), np.eye(4), box=box)  # type: ignore[arg-type]


def test_a_box_of_two_axes_is_refused() -> None:
    with pytest.raises(DiffaugError, match="a box is"):
        place(GRID, (12, 16, 10), np.eye(4), box=((0, 5), (0, 5)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "affine", [np.eye(3), np.diag([1.0, 1.0, 0.0, 1.0]), np.diag([1.0, np.nan, 1.0, 1.0])]
)
def test_an_affine_that_is_none_is_refused(affine: Affine) -> None:
    with pytest.raises(DiffaugError, match="invertible 4 x 4"):
        place(GRID, (10, 10, 10), affine)


def test_affines_of_very_small_voxels_are_fine() -> None:
    grid = Grid(("R", "A", "S"), (1e-4, 1e-4, 1e-4), (8, 8, 8))
    assert place(grid, (8, 8, 8), np.diag([1e-4, 1e-4, 1e-4, 1.0])).same_spacing


def test_bounding_box() -> None:
    mask = torch.zeros(5, 6, 7, dtype=torch.bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[4, 2, 6] = True
    assert bounding_box(mask) == ((1, 5), (2, 3), (3, 7))


# -- there and back ------------------------------------------------------------------------------------------


@given(source=codes, target=codes, shape=shapes, origin=origins, data=st.data())
@settings(max_examples=80, deadline=None)
def test_volumes_of_the_grids_spacing_come_back_exactly(
    source: tuple[str, str, str],
    target: tuple[str, str, str],
    shape: Triple,
    origin: tuple[float, ...],
    data: st.DataObject,
) -> None:
    grid = Grid(target, (1.3, 1.3, 1.3), (10, 7, 12))
    middle = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    placement = place(grid, shape, axis_aligned(source, (1.3, 1.3, 1.3), origin), box=box_around(middle, 0))
    assert placement.same_spacing
    volume = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0))
    values, window = placement.from_grid(placement.to_grid(volume))
    back = torch.zeros_like(volume)
    placement.put_back(back, values, window)
    changed = torch.zeros(shape, dtype=torch.bool)
    placement.put_back(changed, torch.ones(values.shape[2:]), window)
    assert torch.equal(back[:, :, changed], volume[:, :, changed])
    assert not back[:, :, ~changed].any()
    for axis, size in enumerate(placement.source_shape):
        assert window[axis][1] - window[axis][0] == min(size, grid.shape[axis])


def waves(shape: tuple[int, ...], affine: Affine, wavelength: float) -> Tensor:
    """A field `(1, 1, *shape)` of amplitude 1 that varies along all three world axes; wavelength in mm."""
    x = world_coordinates(shape, affine) * (2 * np.pi / wavelength)
    field = (np.sin(x[0] + 0.3) + np.sin(x[1] + 1.1) + np.sin(x[2] - 0.7)) / 3
    return torch.from_numpy(field)[None, None].float()


@given(found=placements())
@settings(max_examples=60, deadline=None)
def test_smooth_volumes_come_back_nearly(found: tuple[Placement, Affine]) -> None:
    """Stated tolerance: of waves 16 times as long as the coarser voxels, 0.15 of the amplitude at the border
    of the volume or the grid (beyond which all is mirrored), 0.07 elsewhere."""
    placement, affine = found
    shape = source_shape(placement)
    coarsest = max(*placement.grid.spacing, *nib.affines.voxel_sizes(affine))
    volume = waves(shape, affine, 16 * coarsest)
    values, window = placement.from_grid(placement.to_grid(volume))
    error = (values - placement.take(volume, window)).abs()[0, 0]
    assert error.max() < 0.15
    rims = [int(np.ceil(2 * max(1.0, ratio))) for ratio in placement.ratio]
    inner = error[tuple(slice(rim, -rim) for rim in rims)]
    assert inner.numel() == 0 or inner.max() < 0.07


@given(found=placements())
@settings(max_examples=60, deadline=None)
def test_constants_stay_constant(found: tuple[Placement, Affine]) -> None:
    placement, _ = found
    on_grid = placement.to_grid(torch.full((1, 1, *source_shape(placement)), 3.0))
    assert on_grid.shape == (1, 1, *placement.grid.shape)
    assert torch.allclose(on_grid, torch.full_like(on_grid, 3.0), atol=1e-5)
    values, _ = placement.from_grid(on_grid)
    assert torch.allclose(values, torch.full_like(values, 3.0), atol=1e-5)


@pytest.mark.parametrize("spacing", [6.0, 5.0, 3.1, 1.7, 1.0, 0.6, 0.3])
def test_a_larger_scan_of_any_spacing_is_read_at_the_right_place(spacing: float) -> None:
    """A linear field is exact everywhere, since nothing is mirrored: neighbours beyond the grid are read
    too."""
    grid = Grid(("R", "A", "S"), (1.0, 1.0, 1.0), (12, 12, 12))
    shape = (70, 70, 70) if spacing < 1 else (24, 24, 24)
    middle = shape[0] // 2
    affine = axis_aligned(("R", "A", "S"), (spacing,) * 3, (0, 0, 0))
    placement = place(grid, shape, affine, box=box_around((middle, middle + 1, middle - 2)))
    field = torch.from_numpy(np.indices(shape).astype(np.float32))[None]
    found = placement.to_grid(field)[0]
    for axis in range(3):
        expected = placement.offset[axis] + placement.ratio[axis] * torch.arange(12.0)
        assert torch.allclose(found[axis].movedim(axis, -1), expected.expand(12, 12, 12), atol=1e-3)


def test_detail_finer_than_the_grid_is_averaged_not_aliased() -> None:
    # A size for which the grid's voxels lie on every fourth of the volume's: all of one sign.
    shape = (41, 41, 41)
    stripes = torch.ones(1, 1, *shape)
    stripes[:, :, ::2] = -1
    grid = Grid(("R", "A", "S"), (2.0, 2.0, 2.0), (10, 10, 10))
    on_grid = place(grid, shape, np.diag([0.5, 0.5, 0.5, 1.0])).to_grid(stripes)
    assert on_grid[..., 1:-1, :, :].abs().max() < 0.01


@given(size=st.integers(1, 25), length=st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_beyond_the_border_the_volume_is_mirrored(size: int, length: int) -> None:
    if length <= size:
        return
    volume = torch.randn(size, 2, 3)
    grid = Grid(("R", "A", "S"), (1.0, 1.0, 1.0), (length, 2, 3))
    found = place(grid, (size, 2, 3), np.eye(4)).to_grid(volume[None, None])[0, 0]
    before = (length - size) // 2
    expected = np.pad(volume.numpy(), [(before, length - size - before), (0, 0), (0, 0)], mode="reflect")
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.uint8, torch.float64])
def test_only_what_the_grid_needs_is_made_float(dtype: torch.dtype) -> None:
    shape = (80, 90, 70)
    volume = torch.randint(0, 200, (1, 1, *shape)).to(dtype)
    for spacing in (GRID.spacing, (1.1, 0.8, 1.4)):
        seen: list[int] = []

        def prepare(part: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(part.numel())
            return part.float()

        placement = place(
            GRID, shape, axis_aligned(("L", "P", "I"), spacing, (0, 0, 0)), box=((30, 40), (40, 50), (30, 40))
        )
        found = placement.to_grid(volume, prepare)
        assert torch.equal(found, placement.to_grid(volume.float()))
        assert len(seen) == 1
        assert seen[0] < volume.numel() / 20


# -- fade ----------------------------------------------------------------------------------------------------


def test_no_fade_where_the_volume_ends_with_the_grid() -> None:
    affine = axis_aligned(("R", "A", "S"), GRID.spacing, (0, 0, 0))
    assert torch.equal(place(GRID, GRID.shape, affine).fade(), torch.ones(GRID.shape))
    assert torch.equal(place(GRID, (3, 4, 5), affine).fade(), torch.ones(GRID.shape))


@pytest.mark.parametrize("spacing", [(1.5, 1.0, 2.0), (0.7, 0.6, 0.9), (1.9, 1.7, 3.3)])
def test_changes_fade_towards_the_faces_beyond_which_the_scan_goes_on(spacing: tuple[float, ...]) -> None:
    grid = Grid(("R", "A", "S"), (1.5, 1.0, 2.0), (16, 20, 14))
    affine = axis_aligned(("R", "A", "S"), spacing, (0, 0, 0))
    placement = place(grid, (80, 90, 85), affine, box=((0, 2), (44, 46), (83, 85)))
    fade = placement.fade()
    middle = [n // 2 for n in grid.shape]
    ramps = (fade[:, middle[1], middle[2]], fade[middle[0], :, middle[2]], fade[middle[0], middle[1], :])
    # Axis 0 begins with the scan, axis 1 lies inside it, axis 2 ends with it.
    for ramp, low, high in zip(ramps, (False, True, True), (True, True, False), strict=True):
        assert ramp[len(ramp) // 2] == 1
        for edge, fades in ((ramp, low), (ramp.flip(0), high)):
            if fades:
                assert edge[0] < 0.05
                assert (edge[1 : RIM + 1] > edge[:RIM]).all()
                assert edge.diff().abs().max() < 0.4
            else:
                assert (edge[:RIM] == 1).all()


# -- label maps ----------------------------------------------------------------------------------------------


@given(found=placements())
@settings(max_examples=60, deadline=None)
def test_label_maps_have_no_anatomy_outside_the_volume(
    found: tuple[Placement, Affine],
) -> None:
    placement, _ = found
    on_grid = placement.label_to_grid(torch.full((1, 1, *source_shape(placement)), 2))
    inside = torch.ones(placement.grid.shape, dtype=torch.bool)
    for axis, size in enumerate(placement.source_shape):
        position = placement.offset[axis] + placement.ratio[axis] * np.arange(placement.grid.shape[axis])
        covered = torch.from_numpy((position > -0.5 - 1e-6) & (position < size - 0.5 + 1e-6))
        inside &= covered.view([-1 if a == axis else 1 for a in range(3)])
    assert torch.equal(on_grid[0, 0], 2 * inside)


def test_labels_of_the_grids_spacing_are_copied() -> None:
    label = torch.randint(0, 3, (1, 1, 8, 11, 6), generator=torch.Generator().manual_seed(0))
    affine = axis_aligned(("L", "A", "S"), GRID.spacing, (0, 0, 0))
    placement = place(GRID, (8, 11, 6), affine)
    found = placement.label_to_grid(label)[0, 0]
    expected = torch.zeros(GRID.shape, dtype=torch.long)
    # (14 - 11) is odd: the grid's surplus of a voxel lies behind.
    expected[1:9, 1:12, 1:7] = label[0, 0].flip(0)
    assert torch.equal(found, expected)


@given(found=placements(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_label_with_the_largest_share_wins(found: tuple[Placement, Affine], seed: int) -> None:
    placement, _ = found
    label = torch.randint(
        0, 5, (1, 1, *source_shape(placement)), generator=torch.Generator().manual_seed(seed)
    )
    shares = placement.to_grid(torch.cat([label == n for n in range(5)], dim=1))
    expected = shares.movedim(1, -1).contiguous().argmax(-1) * placement.inside()
    assert torch.equal(placement.label_to_grid(label)[:, 0], expected.long())


def test_a_resampled_label_keeps_its_volume_and_place() -> None:
    shape = (50, 60, 45)
    affine = axis_aligned(("P", "R", "I"), (0.7, 0.6, 0.9), (3.0, -8.0, 12.0))
    distance = world_coordinates(shape, affine) - centre_of(shape, affine)[:, None, None, None]
    distance -= np.array([4.0, -3.0, 2.0])[:, None, None, None]
    ball = torch.from_numpy((distance**2).sum(axis=0) < 10.0**2)
    grid = Grid(("R", "A", "S"), (1.5, 1.5, 1.5), (28, 28, 30))
    found = place(grid, shape, affine).label_to_grid(ball[None, None].short())[0, 0].numpy()
    assert found.sum() * 1.5**3 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.03)
    centre = (world_coordinates(grid.shape, grid.affine) * found).sum(axis=(1, 2, 3)) / found.sum()
    assert centre == pytest.approx([4, -3, 2], abs=0.15)


def test_beyond_the_scan_lies_its_mirror_image_or_background() -> None:
    volume = torch.linspace(0, 1, 6).view(1, 1, 6, 1, 1).expand(1, 1, 6, 8, 8)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for spacing in (2.0, 1.0):
        size = int(16 / spacing)
        seen = {
            outside: place(
                Grid(("R", "A", "S"), (spacing,) * 3, (size, size, size), outside), (6, 8, 8), affine
            ).image_to_grid(volume)[0, 0, :, size // 2, size // 2]
            for outside in ("mirror", "background")
        }
        border = int(2 / spacing)
        assert (seen["background"][:border] == -1).all()
        assert (seen["background"][-border:] == -1).all()
        assert (seen["mirror"] >= 0).all()
        inside = slice(border, -border)
        assert seen["background"][inside].equal(seen["mirror"][inside])
