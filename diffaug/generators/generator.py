"""The Generator: every verb on volumes of any orientation, spacing, size and unit."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from diffaug.errors import CardError, DiffaugError, LabelError, VerbError
from diffaug.files import atomic_write_json, read_json, sha256_file
from diffaug.generators.architectures import make_model
from diffaug.generators.card import Card, card_json, read_card
from diffaug.generators.grid import Box, Grid, Placement, Window, bounding_box, place
from diffaug.generators.intensity import IntensityMap, fit_intensity_map, typical_map
from diffaug.generators.labels import Vocabulary
from diffaug.generators.model import Model, Sampling
from diffaug.generators.seeds import CaseNoise, case_seeds

# Networks always see this many cases at once, so that the bytes of a case do not depend on the batch it came
# in (matrix products of different heights may sum in different orders). On a CPU one case already fills two
# cores: 19 ms a denoiser step against 16 ms in batches of 8.
CPU_CHUNK = 1
GPU_CHUNK = 8
# A label with a larger share beyond the grid shows another structure than the generator's, or several. Less
# is what an unusually large structure or stray voxels cost.
MOST_CUT = 0.2
# Voxels over which inpainted content fades into the untouched image, inside the mask.
INPAINT_RIM = 2


class Sample(NamedTuple):
    """Cases made from nothing: image `(B, C, I, J, K)` float32 in the card's typical units, label `(B, 1, I,
    J, K)` int16 (all background where the generator knows no labels), and the voxel-to-world affine `(4, 4)`
    in mm, RAS+."""

    image: Tensor
    label: Tensor
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class _Case:
    """One real case on the grid: `image` `(1, C, *grid)` in network units, `one_hot` `(1, L, *grid)`."""

    placement: Placement
    image: Tensor | None = None
    intensity: IntensityMap | None = None
    one_hot: Tensor | None = None


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
        """SHA-256 over the hashes of the weight files: the generator's identity in provenance records."""
        if len(self.card.files) == 1:
            return next(iter(self.card.files.values()))
        return hashlib.sha256(json.dumps(self.card.files, sort_keys=True).encode()).hexdigest()

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
    ) -> Sample:
        """Make `n` cases from nothing, on the generator's grid.

        Args:
            n: number of cases, >= 1.
            seed: one integer, or `n` of them.
            steps: sampler steps, >= 1 (default: the card's).
            guidance: weight of the label on the image, 1 is none (Ho and Salimans 2022; default: the card's).
            sampler: one of those that the architecture has (default: the card's). With another than the
                card's, `steps` defaults to what is usual for it.
        """
        self._require("sample")
        if n < 1:
            raise DiffaugError(f"n must be at least 1, got {n}")
        sampling = self.sampling("sample", steps, guidance, sampler)
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
        sampling = self.sampling("paint", steps, guidance, sampler)
        label = _check_label(label)
        affines = _affines(affine, len(label))
        cases = [
            self._place(label.shape[2:], a, label=row, label_mapping=label_mapping, box=box)
            for row, a in zip(label, affines, strict=True)
        ]
        for index, case in enumerate(cases):
            if case.one_hot is None or not bool(case.one_hot[:, 1:].any()):
                raise LabelError(f"label map {index} of the batch shows no structure on the generator's grid")
        painted = self._sampled(
            lambda noise, condition: self.model.paint(condition, noise, sampling),
            case_seeds(seed, len(label)),
            self._conditions(cases),
        )[0]
        decoded = self._chunked(self.model.decode_image, painted)[0].cpu()
        intensity = typical_map(self.card.intensity)
        floor = intensity.low.float().view(1, -1, 1, 1, 1)
        out = floor.expand(len(label), -1, *label.shape[2:]).clone()
        for n, case in enumerate(cases):
            values, window = case.placement.from_grid(decoded[n : n + 1])
            case.placement.put_back(out[n], intensity.denormalise(values[0]), window)
        return out.to(label.device)

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
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        residual: bool = True,
        box: Box | None = None,
        intensity: Sequence[IntensityMap] | None = None,
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

        Raises:
            LabelError: the label is missing, or the generator knows none, and drift is not allowed; or it
                holds ids that the generator does not know.
            DiffaugError: a larger scan with neither label nor box.
        """
        self._require("vary")
        strength = self.card.defaults.strength if strength is None else strength
        if not 0 <= strength <= 1:
            raise DiffaugError(f"strength must lie in [0, 1], got {strength}")
        sampling = self.sampling("vary", steps, guidance, sampler)
        seeds = case_seeds(seed, len(image))
        cases = self._read(
            image, label, affine, label_mapping, allow_label_drift, [box] * len(image), intensity
        )
        if residual and strength == 0:
            return image.clone()
        if not residual:
            _require_covered(cases)
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
            original = self._chunked(self.model.decode_image, clean)[0].to(image.device)
            return self._add_residuals(image, cases, decoded - original)
        return self._replace(image, cases, decoded)

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
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        box: Box | None = None,
        intensity: Sequence[IntensityMap] | None = None,
    ) -> Tensor:
        """Make a region anew, given the rest and the label; voxels outside `mask` come back bit-identical.

        Args:
            mask: `(B, 1, I, J, K)`, nonzero where the image is made anew. Inside it the new content fades in
                over 2 voxels, or over half the mask's thickness where that is less.
            intensity: as for `vary`.

        Raises:
            LabelError, DiffaugError: as for `vary`.
        """
        self._require("inpaint")
        sampling = self.sampling("inpaint", steps, guidance, sampler)
        expected = (len(image), 1, *image.shape[2:])
        if mask.shape != expected:
            raise DiffaugError(f"mask must have shape {expected} like the image, got {tuple(mask.shape)}")
        mask = mask.to(image.device) != 0
        seeds = case_seeds(seed, len(image))
        # Without a label or box the grid lies around each case's own mask; where that is empty, anywhere.
        whole = ((0, image.shape[2]), (0, image.shape[3]), (0, image.shape[4]))
        boxes = [box or (bounding_box(row[0]) or whole if label is None else None) for row in mask]
        cases = self._read(image, label, affine, label_mapping, allow_label_drift, boxes, intensity)
        for n, case in enumerate(cases):
            covered = int(case.placement.take(mask[n], case.placement.window()).sum())
            if covered < int(mask[n].sum()):
                raise VerbError(
                    f"the mask of case {n} has {int(mask[n].sum())} voxels, the generator's grid around the "
                    f"label or box covers {covered} of them: inpaint a smaller region, or give a box=... "
                    "around it"
                )
        grid_masks = torch.cat(
            [case.placement.to_grid(row[None]) for case, row in zip(cases, mask, strict=True)]
        )
        painted = self._sampled(
            lambda noise, x, region, condition: self.model.inpaint(x, region, condition, noise, sampling),
            seeds,
            self._on_grid(cases),
            (grid_masks > 0).to(self.device),
            self._conditions(cases),
        )[0]
        decoded = self._chunked(self.model.decode_image, painted)[0].to(image.device)
        out = image.clone()
        for n, case in enumerate(cases):
            assert case.intensity is not None
            values, window = case.placement.from_grid(decoded[n : n + 1])
            weight = _fade_inside(mask[n], case.placement, window)
            old = case.placement.take(image[n], window)
            new = old.double() * (1 - weight) + case.intensity.denormalise(values[0]) * weight
            new = torch.where(weight > 0, _to_dtype(new, image.dtype), old)
            case.placement.put_back(out[n], new, window)
        return out

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
        sampling = self.sampling("segment", steps, None, sampler)
        cases = self._read(image, None, affine, None, True, [box] * len(image))
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
        """The latent `(B, Z, i, j, k)` of an image, zero mean and unit variance per channel over the training
        cases."""
        self._require("encode")
        return self._encode_images(self._read(image, None, affine, None, True, [box] * len(image)))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The image `(B, C, *grid.shape)` float32 of a latent, on the generator's grid, in the card's typical
        units."""
        self._require("decode")
        expected = self.model.image_latent
        if latent.shape[1:] != expected:
            raise DiffaugError(
                f"a latent must have shape (B, {', '.join(map(str, expected))}), got {tuple(latent.shape)}"
            )
        return self._typical(latent.to(self.device))

    # -- ways in and out -------------------------------------------------------------------------------------

    def _require(self, verb: str) -> None:
        if verb not in self.verbs:
            raise VerbError(f"{self.name} has no verb {verb!r}; it has {', '.join(sorted(self.verbs))}")

    def sampling(self, verb: str, steps: int | None, guidance: float | None, sampler: str | None) -> Sampling:
        """How a verb samples, with the card's defaults for what is None.

        Raises:
            DiffaugError: for a sampler that the architecture lacks, or numbers that it cannot work with.
        """
        defaults, networks = self.card.defaults, self.card.networks
        if sampler is not None and sampler not in networks.samplers:
            raise DiffaugError(
                f"{networks.architecture} has no sampler {sampler!r}; it has {', '.join(networks.samplers)}"
            )
        if steps is None:
            own = sampler is None or sampler == defaults.sampler
            steps = defaults.steps if own else networks.steps_of(str(sampler), defaults.steps)
        if steps < 1 or (networks.most_steps is not None and steps > networks.most_steps):
            upper = "" if networks.most_steps is None else f" and at most {networks.most_steps}"
            raise DiffaugError(f"steps must be at least 1{upper}, got {steps}")
        if guidance is not None and not guidance >= 0:
            raise DiffaugError(f"guidance must be at least 0 (1 is none), got {guidance}")
        if guidance not in (None, 1.0) and not self.knows_labels:
            raise DiffaugError(
                f"{self.name} knows no labels that could guide it: leave guidance={guidance} out"
            )
        if guidance is None:
            guidance = defaults.guidance_of(verb) if self.knows_labels else 1.0
        return Sampling(sampler or defaults.sampler, steps, guidance, defaults.shift)

    def _read(
        self,
        image: Tensor,
        label: Tensor | None,
        affine: ArrayLike,
        label_mapping: Mapping[int, int] | None,
        allow_label_drift: bool,
        boxes: Sequence[Box | None],
        intensity: Sequence[IntensityMap] | None = None,
    ) -> list[_Case]:
        """Bring a batch of cases onto the grid, after checking all of it."""
        if not isinstance(image, Tensor):
            raise DiffaugError(f"the image must be a torch.Tensor, got {type(image).__name__}")
        if image.ndim != 5 or image.shape[1] != len(self.card.channels):
            raise DiffaugError(
                f"image must have shape (B, {len(self.card.channels)}, I, J, K) with the channels "
                f"{self.card.channels}, got {tuple(image.shape)}"
            )
        if image.dtype == torch.bool or image.is_complex():
            raise DiffaugError(f"the image must hold integers or floats, got {image.dtype}")
        if bad := [n for n, row in enumerate(image) if not bool(torch.isfinite(row).all())]:
            raise DiffaugError(
                f"the image holds NaN or infinite values in case(s) {bad} of the batch: replace them first"
            )
        if label is None and self.knows_labels and not allow_label_drift:
            raise LabelError(
                f"{self.name} preserves a label only if it is given: pass the label map, or "
                "allow_label_drift=True if the anatomy may move"
            )
        if label is not None:
            if not self.knows_labels and not allow_label_drift:
                raise LabelError(
                    f"{self.name} knows no labels and cannot preserve one: pass allow_label_drift=True if "
                    "the anatomy may move"
                )
            label = _check_label(label)
            if label.shape[0] != image.shape[0] or label.shape[2:] != image.shape[2:]:
                raise LabelError(f"label {tuple(label.shape)} does not match image {tuple(image.shape)}")
        if intensity is None:
            intensity = [fit_intensity_map(row, self.card.intensity) for row in image]
        else:
            count = 1 if isinstance(intensity, IntensityMap) else len(intensity)
            if isinstance(intensity, IntensityMap) or count != len(image):
                raise DiffaugError(f"intensity needs a list of {len(image)} maps, one a case; got {count}")
            # A map of a region must not raise what is darker elsewhere in the volume.
            intensity = [m.with_floor_of(row) for m, row in zip(intensity, image, strict=True)]
        cases = []
        for n, (a, box) in enumerate(zip(_affines(affine, len(image)), boxes, strict=True)):
            row = None if label is None else label[n]
            case = self._place(image.shape[2:], a, label=row, label_mapping=label_mapping, box=box)
            on_grid = case.placement.image_to_grid(image[n : n + 1], intensity[n].normalise)
            cases.append(_Case(case.placement, on_grid, intensity[n], case.one_hot))
        return cases

    def _place(
        self,
        shape: Sequence[int],
        affine: NDArray[np.float64],
        *,
        label: Tensor | None,
        label_mapping: Mapping[int, int] | None,
        box: Box | None,
    ) -> _Case:
        """Place a volume of spatial `shape` on the grid, and its label map `(1, I, J, K)` if there is one."""
        if label is None:
            return _Case(place(self.grid, shape, affine, box=box))
        if not self.knows_labels:
            return _Case(place(self.grid, shape, affine, foreground=label[0] != 0, box=box))
        indices = self.vocabulary.indices(label[None], label_mapping)
        foreground = indices[0] != 0
        placement = place(self.grid, shape, affine, foreground=foreground[0], box=box)
        total = int(foreground.sum())
        cut = total - int(placement.take(foreground, placement.window()).sum())
        if box is None and cut > MOST_CUT * total:
            size = " x ".join(f"{n * s:.0f}" for n, s in zip(self.grid.shape, self.grid.spacing, strict=True))
            raise VerbError(
                f"{cut} of the label's {total} voxels lie outside the {size} mm that {self.name} makes: keep "
                "one structure in the label map, or call the verb with box=((i0, i1), (j0, j1), (k0, k1)) in "
                "voxels around it"
            )
        return _Case(placement, one_hot=placement.label_to_grid(indices, self.vocabulary.spread))

    def _add_residuals(self, image: Tensor, cases: list[_Case], differences: Tensor) -> Tensor:
        out = image.clone()
        for n, case in enumerate(cases):
            assert case.intensity is not None
            faded = differences[n : n + 1] * case.placement.fade().to(differences.device)
            values, window = case.placement.from_grid(faded)
            change = case.intensity.denormalise_difference(values[0])
            old = case.placement.take(image[n], window)
            new = _to_dtype(case.intensity.bound(old.double() + change), image.dtype)
            case.placement.put_back(out[n], torch.where(change == 0, old, new), window)
        return out

    def _replace(self, image: Tensor, cases: list[_Case], decoded: Tensor) -> Tensor:
        out = torch.empty_like(image)
        for n, case in enumerate(cases):
            assert case.intensity is not None
            values, window = case.placement.from_grid(decoded[n : n + 1])
            values = _to_dtype(case.intensity.denormalise(values[0]), image.dtype)
            case.placement.put_back(out[n], values, window)
        return out

    # -- networks, always in chunks of one size --------------------------------------------------------------

    def _on_grid(self, cases: list[_Case]) -> Tensor:
        return torch.cat([case.image for case in cases if case.image is not None]).to(self.device)

    def _encode_images(self, cases: list[_Case]) -> Tensor:
        return self._chunked(self.model.encode_image, self._on_grid(cases))[0]

    def _conditions(self, cases: list[_Case]) -> Tensor:
        """Label latents of the cases, or tensors without channels where there is no label to condition on."""
        labels = [case.one_hot for case in cases if case.one_hot is not None]
        if not labels:
            return torch.zeros(len(cases), 0, *self.model.image_latent[1:], device=self.device)
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
        size = CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK
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


def _require_covered(cases: list[_Case]) -> None:
    for n, case in enumerate(cases):
        covered = tuple(stop - start for start, stop in case.placement.window())
        if covered != case.placement.source_shape:
            raise VerbError(
                f"a plain decode (residual=False) covers {covered} of the {case.placement.source_shape} "
                f"voxels of case {n} (grid's axis order); crop the case to the box around its label first"
            )


def _check_label(label: Tensor) -> Tensor:
    if not isinstance(label, Tensor):
        raise LabelError(f"a label map must be a torch.Tensor, got {type(label).__name__}")
    if label.ndim != 5 or label.shape[1] != 1:
        raise LabelError(f"a label map must have shape (B, 1, I, J, K), got {tuple(label.shape)}")
    return label


def _affines(affine: ArrayLike, count: int) -> list[NDArray[np.float64]]:
    array = np.asarray(affine.cpu() if isinstance(affine, Tensor) else affine, dtype=np.float64)
    if array.shape == (4, 4):
        return [array] * count
    if array.shape != (count, 4, 4):
        raise DiffaugError(f"affine must have shape (4, 4) or ({count}, 4, 4), got {array.shape}")
    return list(array)


def _to_dtype(volume: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype`: rounded and clipped to an integer one."""
    if dtype.is_floating_point:
        return volume.to(dtype)
    limits = torch.iinfo(dtype)
    return volume.round().clamp(limits.min, limits.max).to(dtype)


def _fade_inside(mask: Tensor, placement: Placement, window: Window) -> Tensor:
    """Weights of the voxels of `window`: 0 outside a bool mask `(1, I, J, K)`, rising to 1 over the rim
    inside it, or over half its thickness."""
    # With a voxel more on each side, since what lies beyond the window is outside the mask.
    grown = [(max(0, a - 1), min(n, b + 1)) for (a, b), n in zip(window, placement.source_shape, strict=True)]
    mask = placement.take(mask, grown).contiguous()
    outside, depth = (~mask).float(), mask.float()
    for _ in range(INPAINT_RIM):
        outside = nn.functional.max_pool3d(outside, 3, stride=1, padding=1)
        depth += outside == 0
    # Where the mask is thinner than two rims, its middle is still all new.
    weight = depth / nn.functional.max_pool3d(depth, 2 * INPAINT_RIM + 1, 1, INPAINT_RIM).clamp(min=1)
    inner = (slice(a - g, b - g) for (a, b), (g, _) in zip(window, grown, strict=True))
    return weight[:, *inner]
