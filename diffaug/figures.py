"""Figures of volumes: slices with the outlines of their labels."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from diffaug.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart, brightest first: they lie on grey.
COLOURS = ("#f0e442", "#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#d55e00", "#0072b2")
# Volumes beyond this number stand side by side in two blocks.
ONE_BLOCK = 3
# Percentiles of a volume that are drawn black and white.
WINDOW = (0.5, 99.5)
# Sizes in inches: a panel's side, the titles' width, the room for text above and below, a line of the legend.
PANEL, TITLE, TOP, BOTTOM, LINE = 2.0, 0.5, 0.55, 0.3, 0.22
# Between panels, as a share of their side.
GAP = 0.04
# Labels per line of the legend, for each block.
LEGEND = 4
DPI = 110
TEXT: dict[str, Any] = {"color": "white", "fontsize": 8}


class _Plane(NamedTuple):
    """A way to cut a volume in RAS order.

    `cut` is the axis that is cut, `right` and `up` are drawn in these directions; `sides` says what lies
    at the left, right, lower and upper side.
    """

    name: str
    cut: int
    right: int
    up: int
    sides: tuple[str, str, str, str]


PLANES = (
    _Plane("sagittal", 0, 1, 2, ("P", "A", "I", "S")),
    _Plane("coronal", 1, 0, 2, ("L", "R", "I", "S")),
    _Plane("axial", 2, 0, 1, ("L", "R", "P", "A")),
)


class _Case(NamedTuple):
    """Image and label `(I, J, K)` with axes that run to the right, front and top; the voxel's sides in mm."""

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, ...]


def montage(
    volumes: Sequence[ArrayLike],
    labels: Sequence[ArrayLike | None],
    titles: Sequence[str],
    path: str | PathLike[str],
    *,
    affines: Sequence[np.ndarray] | None = None,
    names: Mapping[int, str] | None = None,
    heading: str = "",
    footer: str = "",
    shown: Sequence[ArrayLike | None] | None = None,
) -> None:
    """Draw each volume in three planes through the middle of its label, outlined, and write a PNG file.

    Equal input gives equal bytes. All panels have one scale in mm and the patient's left on the left; each
    volume has its own grey scale.

    Args:
        volumes: at least one, `(I, J, K)` or `(C, I, J, K)`, of which the first channel is drawn.
        labels: a label map for each, `(I, J, K)` or `(1, I, J, K)`, 0 being background; or None, for planes
            through the volume's centre.
        titles: one for each.
        path: the file.
        affines: (4, 4) of each, RAS+ mm; default: axes run to the right, front and top, voxels are cubes.
        names: label id -> name, for the legend; default: the ids themselves.
        heading, footer: text above and below.
        shown: label maps through whose middle the planes go; default: the ones that are drawn.

    Raises:
        ValueError: the sequences differ in length or are empty, or a volume and its label in shape.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    places = [np.eye(4)] * len(volumes) if affines is None else affines
    if not len(volumes) == len(labels) == len(titles) == len(places) > 0:
        raise ValueError(
            f"{len(volumes)} volumes, {len(labels)} labels, {len(titles)} titles, {len(places)} affines: "
            "give as many of each, at least one"
        )
    cases = [_canonical(*case) for case in zip(volumes, labels, places, strict=True)]
    cut = [
        case if shown is None else _canonical(volume, label, place)
        for case, volume, label, place in zip(cases, volumes, shown or labels, places, strict=True)
    ]
    found = {int(number) for case in cases if case.label is not None for number in np.unique(case.label)}
    legend = {number: f"label {number}" for number in sorted(found - {0})} if names is None else dict(names)
    legend.pop(0, None)
    colours = {number: COLOURS[index % len(COLOURS)] for index, number in enumerate(legend)}

    blocks = 1 if len(cases) <= ONE_BLOCK else 2
    rows, columns = -(-len(cases) // blocks), LEGEND * blocks
    bottom = BOTTOM + LINE * -(-len(legend) // columns)
    width, height = blocks * (TITLE + 3 * PANEL), TOP + rows * PANEL + bottom
    sides = [s * n for case in cases for s, n in zip(case.spacing, case.image.shape, strict=True)]
    side = max(sides) * (1 + GAP)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="black")
    FigureCanvasAgg(figure)
    for index, (case, title) in enumerate(zip(cases, titles, strict=True)):
        block, row = divmod(index, rows)
        left, low = block * (TITLE + 3 * PANEL) + TITLE, bottom + (rows - 1 - row) * PANEL
        middle = (low + PANEL / 2) / height
        figure.text((left - 0.05) / width, middle, title, rotation=90, ha="right", va="center", **TEXT)
        for number, plane in enumerate(PLANES):
            x = left + number * PANEL
            axes = figure.add_axes((x / width, low / height, PANEL / width, PANEL / height))
            _draw(axes, case, plane, _middle(cut[index], plane.cut), colours, side)
            if row == 0:
                figure.text((x + PANEL / 2) / width, 1 - TOP / height, plane.name, ha="center", **TEXT)
    figure.text(0.5, 1 - 0.08 / height, heading, ha="center", va="top", **TEXT)
    figure.text(0.5, 0.08 / height, footer, ha="center", **TEXT)
    figure.legend(
        handles=[Line2D([], [], color=colours[number], label=name) for number, name in legend.items()],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.18 / height),
        ncols=min(columns, max(1, len(legend))),
        frameon=False,
        labelcolor="white",
        fontsize=8,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _canonical(volume: ArrayLike, label: ArrayLike | None, affine: np.ndarray) -> _Case:
    orientation = nib.orientations.io_orientation(affine)
    sides = nib.affines.voxel_sizes(affine)
    image = np.asarray(volume)
    image = image[0] if image.ndim == 4 else image
    marks = None
    if label is not None:
        marks = np.asarray(label)
        marks = marks[0] if marks.ndim == 4 else marks
        if marks.shape != image.shape:
            raise ValueError(f"a label of shape {marks.shape} does not fit its volume of shape {image.shape}")
        marks = nib.orientations.apply_orientation(marks, orientation)
    spacing = tuple(float(sides[axis]) for axis in np.argsort(orientation[:, 0]))
    return _Case(nib.orientations.apply_orientation(image, orientation), marks, spacing)


def _middle(case: _Case, axis: int) -> int:
    """The slice to show: the median of the label's voxels, so that it has some."""
    if case.label is None or not case.label.any():
        return case.image.shape[axis] // 2
    index = np.sort(case.label.nonzero()[axis])
    return int(index[len(index) // 2])


def _draw(
    axes: "Axes", case: _Case, plane: _Plane, where: int, colours: Mapping[int, str], side: float
) -> None:
    """The slice `where` in a square of `side` mm, with the outlines of its labels and the letters of its
    sides."""
    from matplotlib.patheffects import withStroke

    image = case.image.take(where, axis=plane.cut).T
    low, high = (float(value) for value in np.percentile(case.image, WINDOW))
    step_x, step_y = case.spacing[plane.right], case.spacing[plane.up]
    width, height = image.shape[1] * step_x, image.shape[0] * step_y
    axes.imshow(
        image,
        cmap="gray",
        vmin=low,
        vmax=high if high > low else low + 1,
        origin="lower",
        extent=(-width / 2, width / 2, -height / 2, height / 2),
        interpolation="bilinear",
    )
    marks = None if case.label is None else case.label.take(where, axis=plane.cut).T
    for number, colour in colours.items():
        if marks is not None and (marks == number).any():
            # A rim of background closes outlines that run into the border.
            mask = np.pad((marks == number).astype(np.float32), 1)
            x = (np.arange(mask.shape[1]) - 0.5) * step_x - width / 2
            y = (np.arange(mask.shape[0]) - 0.5) * step_y - height / 2
            axes.contour(x, y, mask, levels=[0.5], colors=[colour], linewidths=1)
    axes.set(xlim=(-side / 2, side / 2), ylim=(-side / 2, side / 2))
    axes.set_axis_off()
    left, right, lower, upper = plane.sides
    outline = [withStroke(linewidth=1.5, foreground="black")]
    style: dict[str, Any] = {"color": "white", "fontsize": 6, "path_effects": outline}
    axes.text(-width / 2, 0, f" {left}", ha="left", va="center", **style)
    axes.text(width / 2, 0, f"{right} ", ha="right", va="center", **style)
    axes.text(0, -height / 2, lower, ha="center", va="bottom", **style)
    axes.text(0, height / 2, upper, ha="center", va="top", **style)
