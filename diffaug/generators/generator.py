"""The Generator: every verb on volumes of any orientation, spacing, size and unit."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from diffaug.errors import CardError, DiffaugError, UnlikeError, VerbError
from diffaug.files import atomic_write_json, read_json, sha256_file
from diffaug.generators.architectures import make_model
from diffaug.generators.card import Card, card_json, read_card
from diffaug.generators.cases import (
    Case,
    add_differences,
    beside_labels,
    masks_on_grid,
    place_case,
    read_images,
    read_labels,
    replace,
    replace_inside,
    require_covered,
)
from diffaug.generators.grid import Box, Grid, Placement, bounding_box
from diffaug.generators.intensity import IntensityMap, typical_map
from diffaug.generators.labels import Vocabulary
from diffaug.generators.model import Model
from diffaug.generators.seeds import CaseNoise, case_seeds

# Networks always see this many cases at once, so that the bytes of a case do not depend on the batch it came
# in (matrix products of different heights may sum in different orders). On a CPU one case already fills two
# cores: 19 ms a denoiser step against 16 ms in batches of 8.
CPU_CHUNK = 1
GPU_CHUNK = 8
# Voxels of a chunk on a GPU at most, where that is more than one case: 2 of 128 x 128 x 128.
GPU_VOXELS = 2**22


# What to do with an image that is unlike the training data.
Unlike = Literal["warn", "raise", "ignore"]


class Sample(NamedTuple):
    """Cases made from nothing: image `(B, C, I, J, K)` float32 in the card's typical units, label `(B, 1, I,
    J, K)` int16 (all background where the generator knows no labels), and the voxel-to-world affine `(4, 4)`
    in mm, RAS+."""

    image: Tensor
    label: Tensor
    affine: NDArray[np.float64]


class Generator:
    """A pretrained generator: a model, the grid it works on, and its card.

    Verbs take tensors with the axes as nibabel gives them: image `(B, C, I, J, K)` of any numeric dtype and
    unit, label map `(B, 1, I, J, K)` of integers, affine `(4, 4)` or `(B, 4, 4)` (voxel to world, mm, RAS+).
    What comes back has the same shape and dtype. A `seed` is an integer, from which each case of the batch
    gets its own, or one seed per case; the bytes of a case depend on its seed, not on the batch size.
    """

    def __init__(self, card: Card, model: Model, plan: Mapping[str, Any] | None = None) -> None:
        self.card = card
        self.model = model
        self.grid: Grid = card.to_grid()
        self.verbs: frozenset[str] = frozenset(card.verbs)
        self.vocabulary = Vocabulary(card.labels)
        self.plan = dict(plan or {})
        self.device = torch.device("cpu")

    @property
    def name(self) -> str:
        """The card's name."""
        return self.card.name

    @property
    def weights_hash(self) -> str:
        """The card's."""
        return self.card.weights_hash

    @property
    def knows_labels(self) -> bool:
        """Whether the generator has a label vocabulary."""
        return len(self.vocabulary) > 0

    def to(self, device: torch.device | str) -> "Generator":
        """Move the networks to `device`; returns this generator.

        Raises:
            DiffaugError: for a device that torch does not know or cannot use here.
        """
        try:
            self.model.to(device)
        except (RuntimeError, AssertionError) as error:
            self.model.to(self.device)
            raise DiffaugError(f"cannot use the device {device!s}: {error}") from error
        self.device = torch.device(device)
        return self

    def __repr__(self) -> str:
        verbs = ", ".join(sorted(self.verbs))
        return f"Generator({self.name!r}, verbs={verbs}, grid={self.grid.shape}, device={self.device})"

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write `card.json`, `plan.json` and the weights to `folder`; the card is written last.

        The generator goes on with the weights as written (joint-flow rounds them to float16): the ones that
        its hash names.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.model.save_weights(folder)
        self.model.load_weights(folder, files)
        self.card = self.card.model_copy(
            update={"files": {name: sha256_file(folder / name) for name in files}}
        )
        if self.card.audit is not None and self.card.audit.weights != self.weights_hash:
            # It was of other weights.
            self.card = self.card.model_copy(update={"audit": None})
        atomic_write_json(folder / "plan.json", self.plan)
        atomic_write_json(folder / "card.json", card_json(self.card))

    @classmethod
    def load(cls, folder: Path | str) -> "Generator":
        """Read a generator that `save` wrote.

        Raises:
            CardError: for a card that is missing or not valid, or weights that are missing, altered or do not
                fit.
        """
        folder = Path(folder)
        card = read_card(folder / "card.json")
        for name, expected in card.files.items():
            if not (folder / name).is_file():
                raise CardError(f"{folder / name} is missing, but the card lists it; copy the whole folder")
            found = sha256_file(folder / name)
            if found != expected:
                raise CardError(
                    f"{folder / name} has SHA-256 {found}, the card says {expected}: the file was altered or "
                    "is incomplete; copy it again"
                )
        # Networks draw initial weights before they read theirs: the caller's random state must not notice.
        with torch.random.fork_rng(devices=[]):
            model = make_model(card.networks)
        model.load_weights(folder, card.files)
        return cls(card, model, _read_plan(folder / "plan.json"))

    # -- verbs -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        parameters: Mapping[str, float | str] | None = None,
    ) -> Sample:
        """Make `n` cases from nothing, on the generator's grid.

        Args:
            n: number of cases, >= 1.
            seed: one integer, or `n` of them.
            steps: sampler steps, >= 1 (default: the card's).
            guidance: weight of the label on the image, 1 is none (Ho and Salimans 2022; default: the card's).
            sampler: one of those that the architecture has (default: the card's). With another than the
                card's, `steps` defaults to what is usual for it.
            parameters: what else the generator is told, by name (the card's `parameters`).
        """
        self._require("sample")
        if n < 1:
            raise DiffaugError(f"n must be at least 1, got {n}")
        sampling = self.card.sampling("sample", steps, guidance, sampler, parameters)
        images, labels = self._sampled(lambda noise: self.model.sample(noise, sampling), case_seeds(seed, n))
        return Sample(self._typical(images), self._decode_label(labels), self.grid.affine)

    @torch.no_grad()
    def paint(
        self,
        label: Tensor,
        affine: ArrayLike,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        parameters: Mapping[str, float | str] | None = None,
        label_mapping: Mapping[int, int] | None = None,
        box: Box | None = None,
    ) -> Tensor:
        """Make an image that shows the anatomy of a label map, on the label map's own voxels.

        Returns `(B, C, I, J, K)` float32 in the card's typical units. Voxels that the generator's grid does
        not cover have the value of the lower end of the intensity range.

        Raises:
            LabelError: for ids that the generator does not know, or a label map without foreground.
        """
        self._require("paint")
        sampling = self.card.sampling("paint", steps, guidance, sampler, parameters)
        cases = read_labels(self.card, label, affine, label_mapping=label_mapping, box=box)
        painted = self._sampled(
            lambda noise, condition: self.model.paint(condition, noise, sampling),
            case_seeds(seed, len(label)),
            self._conditions(cases),
        )[0]
        decoded = self._chunked(self.model.decode_image, painted)[0].cpu()
        return beside_labels(self.card, label, cases, decoded)

    @torch.no_grad()
    def vary(
        self,
        image: Tensor,
        label: Tensor | None,
        affine: ArrayLike,
        *,
        strength: float | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        parameters: Mapping[str, float | str] | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        residual: bool = True,
        box: Box | None = None,
        intensity: Sequence[IntensityMap] | None = None,
        unlike: Unlike = "warn",
    ) -> Tensor:
        """Make another image of the same anatomy: SDEdit (Meng et al. 2022) in latent space, given the label.

        `out = x + m (D(z') - D(z))`: D the decoder, z the code of x, z' the varied code, m a mask that fades
        to 0 where the volume goes on beyond the grid. Voxels outside the grid are untouched.

        Args:
            strength: noise level from which the variation starts: 0 returns the input exactly, at 1 nothing
                but the label decides the new anatomy and contrast.
            allow_label_drift: vary without conditioning on a label; the anatomy may move.
            residual: False gives the plain decode D(z') instead, which does not carry the scan's own noise
                (for data that leave the house). It needs a volume that the grid covers.
            intensity: one map for each image instead of those of the images themselves: `fit_intensity_map`
                of the whole scans where `image` holds crops of them, or of a region around the structure
                where the contrast of the whole scan is not what the generator knows.
            unlike: "warn", "raise" or "ignore" where the reconstruction of an image is worse than that of any
                case that was held out (the card's `unlike_above`); looked at where the residual is kept.

        Raises:
            UnlikeError: an image is unlike the training data, and `unlike` is "raise".
            LabelError: drift is not allowed, and the label is missing or given to a generator that knows
                none; or it holds ids that the generator does not know.
            DiffaugError: a larger scan with neither label nor box.
        """
        self._require("vary")
        strength = self.card.defaults.strength if strength is None else strength
        if not 0 <= strength <= 1:
            raise DiffaugError(f"strength must lie in [0, 1], got {strength}")
        sampling = self.card.sampling("vary", steps, guidance, sampler, parameters)
        seeds = case_seeds(seed, len(image))
        cases = read_images(
            self.card,
            image,
            label,
            affine,
            label_mapping=label_mapping,
            allow_label_drift=allow_label_drift,
            boxes=[box] * len(image),
            intensity=intensity,
        )
        if residual and strength == 0:
            return image.clone()
        if not residual:
            require_covered(cases)
        clean = self._encode_images(cases)
        varied = clean
        if strength > 0:
            varied = self._sampled(
                lambda noise, z, condition: self.model.vary(z, strength, condition, noise, sampling),
                seeds,
                clean,
                self._conditions(cases),
            )[0]
        decoded = self._chunked(self.model.decode_image, varied)[0].to(image.device)
        if residual:
            return add_differences(image, cases, self._difference(decoded, cases, clean, unlike))
        return replace(image, cases, decoded)

    @torch.no_grad()
    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        label: Tensor | None,
        affine: ArrayLike,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        parameters: Mapping[str, float | str] | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        residual: bool = False,
        box: Box | None = None,
        intensity: Sequence[IntensityMap] | None = None,
        unlike: Unlike = "warn",
    ) -> Tensor:
        """Make a region anew, given the rest and the label; voxels outside `mask` come back bit-identical.

        Args:
            mask: `(B, 1, I, J, K)`, nonzero where the image is made anew. Inside it the new content fades in
                over 2 voxels, or over half the mask's thickness where that is less.
            residual: keep the scan's finest grain inside the mask, as `vary` does: D(z') - D(z) is added
                there. For augmentation, where a smoother region would give itself away; not where something
                has to vanish, of which it leaves a ghost.
            intensity, unlike: as for `vary`.

        Raises:
            LabelError, DiffaugError: as for `vary`.
        """
        self._require("inpaint")
        sampling = self.card.sampling("inpaint", steps, guidance, sampler, parameters)
        expected = (len(image), 1, *image.shape[2:])
        if mask.shape != expected:
            raise DiffaugError(f"mask must have shape {expected} like the image, got {tuple(mask.shape)}")
        mask = mask.to(image.device) != 0
        seeds = case_seeds(seed, len(image))
        # Without a label or box the grid lies around each case's own mask; where that is empty, anywhere.
        whole = ((0, image.shape[2]), (0, image.shape[3]), (0, image.shape[4]))
        boxes = [box or (bounding_box(row[0]) or whole if label is None else None) for row in mask]
        cases = read_images(
            self.card,
            image,
            label,
            affine,
            label_mapping=label_mapping,
            allow_label_drift=allow_label_drift,
            boxes=boxes,
            intensity=intensity,
        )
        regions = masks_on_grid(mask, cases)
        painted = self._sampled(
            lambda noise, x, region, condition: self.model.inpaint(x, region, condition, noise, sampling),
            seeds,
            self._on_grid(cases),
            regions.to(self.device),
            self._conditions(cases),
        )[0]
        decoded = self._chunked(self.model.decode_image, painted)[0].to(image.device)
        if residual:
            difference = self._difference(decoded, cases, self._encode_images(cases), unlike)
            return replace_inside(image, mask, cases, difference, differences=True)
        return replace_inside(image, mask, cases, decoded)

    @torch.no_grad()
    def segment(
        self,
        image: Tensor,
        affine: ArrayLike,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        sampler: str | None = None,
        box: Box | None = None,
    ) -> Tensor:
        """The generator's own opinion of the labels of an image: `(B, 1, I, J, K)` int16; background outside
        the grid."""
        self._require("segment")
        sampling = self.card.sampling("segment", steps, None, sampler)
        cases = self._without_label(image, affine, box)
        latents = self._sampled(
            lambda noise, z: self.model.segment(z, noise, sampling),
            case_seeds(seed, len(image)),
            self._encode_images(cases),
        )[0]
        shares = self._chunked(self.model.decode_label, latents)[0].softmax(dim=1).to(image.device)
        out = torch.zeros((len(image), 1, *image.shape[2:]), dtype=torch.int16, device=image.device)
        for n, case in enumerate(cases):
            values, window = case.placement.from_grid(shares[n : n + 1])
            case.placement.put_back(out[n], self.vocabulary.from_scores(values)[0], window)
        return out

    @torch.no_grad()
    def encode(self, image: Tensor, affine: ArrayLike, *, box: Box | None = None) -> Tensor:
        """The latents of images, float32 `(B, *model.image_latent)`.

        Joint-flow's are `(B, Z, i, j, k)` in the grid's axes, with zero mean and unit variance per channel
        over the training cases; Medical Diffusion's `(B, Z, d, h, w)`, depth first, with the codebook's range
        at -1 and 1.
        """
        self._require("encode")
        return self._encode_images(self._without_label(image, affine, box))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The image `(B, C, *grid.shape)` float32 of a latent, on the generator's grid, in the card's typical
        units."""
        self._require("decode")
        expected = self.model.image_latent
        larger = self.card.windowed and latent.ndim == 5 and latent.shape[1] == expected[0]
        fits = larger and all(n >= w for n, w in zip(latent.shape[2:], expected[1:], strict=True))
        if latent.shape[1:] != expected and not fits:
            raise DiffaugError(
                f"a latent must have shape (B, {', '.join(map(str, expected))}), got {tuple(latent.shape)}"
            )
        if not bool(torch.isfinite(latent).all()):
            raise DiffaugError("the latent holds NaN or infinite values")
        return self._typical(latent.to(self.device))

    def placement(
        self,
        shape: Sequence[int],
        affine: ArrayLike,
        label: Tensor | None = None,
        *,
        label_mapping: Mapping[int, int] | None = None,
        box: Box | None = None,
    ) -> Placement:
        """Where the generator's grid lies in a case, for the verbs and for what is made around them.

        Args:
            shape: of the volume, `(I, J, K)`.
            label: `(1, I, J, K)`, integers, or None.

        Raises:
            LabelError, DiffaugError: as for `vary`.
        """
        affine = np.asarray(affine, dtype=np.float64)
        return place_case(
            self.card, shape, affine, label=label, label_mapping=label_mapping, box=box
        ).placement

    # -- ways in and out -------------------------------------------------------------------------------------

    def _require(self, verb: str) -> None:
        if verb not in self.verbs:
            raise VerbError(f"{self.name} has no verb {verb!r}; it has {', '.join(sorted(self.verbs))}")

    def _without_label(self, image: Tensor, affine: ArrayLike, box: Box | None) -> list[Case]:
        return read_images(
            self.card,
            image,
            None,
            affine,
            label_mapping=None,
            allow_label_drift=True,
            boxes=[box] * len(image),
        )

    # -- networks, always in chunks of one size --------------------------------------------------------------

    def _on_grid(self, cases: list[Case]) -> Tensor:
        images = [case.image for case in cases if case.image is not None]
        if len({image.shape for image in images}) > 1:
            raise DiffaugError(
                "the volumes of a batch cover differently many voxels of the generator's grid, as their "
                "spacings or orientations differ: give them one by one"
            )
        return torch.cat(images).to(self.device)

    def _encode_images(self, cases: list[Case]) -> Tensor:
        return self._chunked(self.model.encode_image, self._on_grid(cases))[0]

    def _difference(self, decoded: Tensor, cases: list[Case], clean: Tensor, unlike: Unlike) -> Tensor:
        """What was made, less the reconstructions of the cases from their latents `clean`."""
        clip = self.card.intensity.clip
        original = self._chunked(self.model.decode_image, clean)[0].clamp(-clip, clip)
        if unlike != "ignore" and self.card.unlike_above is not None:
            errors = (original - self._on_grid(cases)).abs().flatten(1).mean(1)
            self._tell_unlike(errors.tolist(), self.card.unlike_above, unlike)
        return decoded.clamp(-clip, clip) - original.to(decoded.device)

    def _tell_unlike(self, errors: list[float], most: float, unlike: Unlike) -> None:
        beyond = [n for n, error in enumerate(errors) if error > most]
        if not beyond:
            return
        message = (
            f"case(s) {beyond} of the batch are unlike what {self.name} was trained on: their reconstruction "
            f"is off by {max(errors):.3f} (network units), that of cases that were held out by at most "
            f"{most:.3f}. Check modality, orientation and units, or pass unlike='ignore'"
        )
        if unlike == "raise":
            raise UnlikeError(message)
        warnings.warn(message, stacklevel=4)

    @torch.no_grad()
    def reconstruction_error(
        self, image: Tensor, affine: ArrayLike, *, box: Box | None = None
    ) -> list[float]:
        """How far the reconstruction of each image is off: mean absolute difference in network units.

        Args:
            image: `(B, C, I, J, K)`.
            box: as for `vary`, in a larger scan.
        """
        self._require("encode")
        cases = self._without_label(image, affine, box)
        clip = self.card.intensity.clip
        rebuilt = self._chunked(self.model.decode_image, self._encode_images(cases))[0].clamp(-clip, clip)
        errors: list[float] = (rebuilt - self._on_grid(cases)).abs().flatten(1).mean(1).tolist()
        return errors

    def _conditions(self, cases: list[Case]) -> Tensor:
        """Label latents of the cases, or tensors without channels where there is no label to condition on."""
        labels = [case.label for case in cases if case.label is not None]
        if not labels:
            latent = self.model.image_latent[1:]
            if self.card.windowed:
                sides = zip(cases[0].placement.grid.shape, self.grid.shape, latent, strict=True)
                latent = tuple(n * z // window for n, window, z in sides)
            return torch.zeros(len(cases), 0, *latent, device=self.device)
        return self._chunked(self.model.encode_label, torch.cat(labels).to(self.device))[0]

    def _typical(self, latents: Tensor) -> Tensor:
        """Image latents to volumes on the grid, in the card's typical units."""
        volumes = self._chunked(self.model.decode_image, latents)[0].cpu()
        return typical_map(self.card.intensity).denormalise(volumes).float()

    def _decode_label(self, latents: Tensor) -> Tensor:
        if not self.knows_labels:
            return torch.zeros(len(latents), 1, *self.grid.shape, dtype=torch.int16)
        return self.vocabulary.from_scores(self._chunked(self.model.decode_label, latents)[0].cpu())

    def _sampled(
        self, function: Callable[..., Tensor | tuple[Tensor, ...]], seeds: Sequence[int], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function(noise, *inputs)` in chunks; each case has the noise of its seed."""
        rows = torch.tensor(seeds, dtype=torch.int64)
        return self._chunked(lambda s, *x: function(CaseNoise(s.tolist(), self.device), *x), rows, *inputs)

    def _chunked(
        self, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply `function` to chunks of a fixed number of cases; the last one is filled up and cut again."""
        size = CPU_CHUNK
        if self.device.type != "cpu":
            size = max(1, min(GPU_CHUNK, GPU_VOXELS // prod(self.grid.shape)))
            if self.card.windowed:
                # Windows fill the device.
                size = 1
        count = len(inputs[0])
        results = []
        for start in range(0, count, size):
            rows = [x[start : start + size] for x in inputs]
            short = size - len(rows[0])
            if short:
                rows = [torch.cat([r, r[:1].expand(short, *r.shape[1:])]) for r in rows]
            output = function(*rows)
            output = output if isinstance(output, tuple) else (output,)
            results.append(tuple(o[: size - short] for o in output))
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path) if path.exists() else None
    except DiffaugError as error:
        raise CardError(f"{error}; copy it again") from error
