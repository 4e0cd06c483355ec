"""The figures: each is a list of cells, and each cell a function that returns plain JSON."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import numpy as np
import torch
from bench import Bench, Cell, machine
from cases import GRID, LABELS, Cases, to_network_units
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from diffaug.evaluation.overlap import dice
from diffaug.evaluation.segmenter import Segmenter, predict, standardise
from diffaug.evaluation.statistics import ks_null, ks_statistic, nearer_share_interval
from diffaug.operations import Case, Inpainting, Operation, Repaint, apply_to_cases
from diffaug.operations.regions import Shape

# Largest displacements of a repaint, mm.
AMPLITUDES = (0, 2, 4, 6)
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REAL_COUNTS = (8, 32)
FEW_LABELS = 2
FINE_TUNING_RATE = 1e-3
# Steps on the few real labels, as a share of the benchmark's steps.
FINE_TUNING = 1 / 4
SPEED_BATCH = 8
BUILD_SIZES = (8, 32)


def _convolution_flops(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


# torch counts its own operations only.
ONEDNN_FLOPS = {torch.ops.aten.mkldnn_convolution: _convolution_flops}


# -------- latent and autoencoders


def latent(bench: Bench) -> list[Cell]:
    """Size of the latent against the volume."""

    def measure() -> dict[str, Any]:
        model = bench.generator.model
        label = model.encode_label(torch.zeros(1, 1, *GRID.shape))
        numbers = int(np.prod(model.image_latent)) + label.numel()
        return {"latent_numbers": numbers, "voxels": int(np.prod(GRID.shape))}

    return [Cell("latent", measure)]


def reconstruction(bench: Bench) -> list[Cell]:
    """What the autoencoders lose: PSNR and the judge's Dice on plain decodes; the label map's round trip."""

    def measure() -> dict[str, Any]:
        cases, generator = bench.held_out, bench.generator
        decoded = generator.vary(
            cases.images, cases.labels, GRID.affine, strength=0.0, residual=False, **bench.drift
        )
        pairs = zip(cases.network_units(), decoded, cases.images, strict=True)
        psnr = [_psnr(original, to_network_units(image, source)) for original, image, source in pairs]
        found = {
            **_who(cases),
            "psnr_db": psnr,
            "psnr_between_patients_db": _psnr_between_patients(cases),
            "dice_original": segmenter_dice(bench.judge, cases.images, cases.labels),
            "dice_reconstruction": segmenter_dice(bench.judge, decoded, cases.labels),
        }
        if generator.knows_labels:
            places = generator.vocabulary.indices(cases.labels)
            codes = [generator.model.encode_label(case) for case in places.split(1)]
            scores = torch.cat([generator.model.decode_label(code) for code in codes])
            rebuilt = generator.vocabulary.from_scores(scores)
            found["dice_label_round_trip"] = dice(rebuilt, cases.labels, LABELS).tolist()
        return found

    return [Cell("reconstruction", measure)]


# -------- synthetic cases as training data


def utility(bench: Bench) -> list[Cell]:
    """Dice of segmenters trained on real or on sampled cases; on validation, once, with twice the steps."""
    cells = []

    def add(kind: str, count: int, seed: int, steps: int) -> None:
        def measure() -> dict[str, Any]:
            model = bench.segmenter(kind, count, seed, steps)
            found = {
                **_who(bench.held_out),
                "dice": segmenter_dice(model, bench.held_out.images, bench.held_out.labels),
            }
            return found | (_labelled_by(bench) if kind == "synthetic" else {})

        cells.append(Cell(f"utility/{kind}-{count}-seed{seed}-steps{steps}", measure, kind == "synthetic"))

    everything = [("real", len(bench.train)), ("synthetic", bench.pairs)]
    for kind, count in [*[("real", count) for count in REAL_COUNTS], *everything]:
        for seed in bench.seeds:
            add(kind, count, seed, bench.steps)
    if bench.subset == "validation":
        for kind, count in everything:
            add(kind, count, bench.seeds[0], 2 * bench.steps)
    return cells


def few_labels(bench: Bench) -> list[Cell]:
    """Two labelled cases and classical augmentation: from scratch against pretrained on the sampled pairs.

    Both arms see the same two cases and take the same number of steps in all. Not for a generator whose
    samples the judge labels, which has seen all labels.
    """
    cells: list[Cell] = []
    if _lacks_labels(bench):
        return cells
    fine_tuning = round(FINE_TUNING * bench.steps)
    settings = {"fine_tuning_steps": fine_tuning, "fine_tuning_rate": FINE_TUNING_RATE}

    def add(seed: int, pretrained: bool) -> None:
        def measure() -> dict[str, Any]:
            cases = bench.train.draw(FEW_LABELS, seed, one_per_patient=True)
            name = f"few-{FEW_LABELS}-seed{seed}"
            if pretrained:
                start = bench.segmenter("synthetic", bench.pairs, seed)
                name += f"-steps{bench.steps}-{bench.pairs}-{bench.generator_hash}"
                name += f"-then{fine_tuning}-rate{FINE_TUNING_RATE}"
                rate = FINE_TUNING_RATE
                model = bench.kept(name, cases, seed=seed, steps=fine_tuning, start=start, learning_rate=rate)
            else:
                steps = bench.steps + fine_tuning
                model = bench.kept(f"{name}-scratch-steps{steps}", cases, seed=seed, steps=steps)
            scores = segmenter_dice(model, bench.held_out.images, bench.held_out.labels)
            return {**_who(bench.held_out), "labelled": list(cases.names), "dice": scores}

        arm = "pretrained" if pretrained else "scratch"
        cells.append(Cell(f"few_labels/{arm}-seed{seed}", measure, pretrained, settings))

    for seed in bench.seeds:
        add(seed, False)
        add(seed, True)
    return cells


# -------- paint and vary


def paint(bench: Bench) -> list[Cell]:
    """The judge's Dice on images painted for real label maps."""

    def measure() -> dict[str, Any]:
        cases = bench.held_out
        painted = bench.generator.paint(cases.labels, GRID.affine, seed=0)
        return {
            **_who(cases),
            "dice_original": segmenter_dice(bench.judge, cases.images, cases.labels),
            "dice_painted": segmenter_dice(bench.judge, painted, cases.labels),
        }

    return [] if _lacks_labels(bench) else [Cell("paint", measure)]


def vary(bench: Bench) -> list[Cell]:
    """What varied images keep of the label and how far they move, with and without the residual."""

    def originals() -> dict[str, Any]:
        cases = bench.held_out
        volumes = cases.network_units()
        return {
            **_who(cases),
            **_kept_and_shifted(bench.judge, cases.images, cases.labels),
            "distances_between_patients": _distances_between_patients(volumes, cases.patients),
        }

    def at(strength: float, residual: bool) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            cases, generator = bench.held_out, bench.generator
            settings = {"residual": residual, "seed": 0, **bench.sampling, **bench.drift}
            varied = generator.vary(cases.images, cases.labels, GRID.affine, strength=strength, **settings)
            unvaried = generator.vary(cases.images, cases.labels, GRID.affine, strength=0.0, **settings)
            pairs = zip(varied, unvaried, cases.images, strict=True)
            movement = [
                float((to_network_units(a, source) - to_network_units(b, source)).abs().mean())
                for a, b, source in pairs
            ]
            return {
                **_who(cases),
                **_kept_and_shifted(bench.judge, varied, cases.labels),
                "movement": movement,
            }

        return measure

    cells = [Cell("vary/originals", originals, False)]
    for residual in (True, False):
        kind = "residual" if residual else "plain"
        cells += [Cell(f"vary/{kind}-{strength}", at(strength, residual)) for strength in STRENGTHS]
    return cells


def operations(bench: Bench) -> list[Cell]:
    """The judge's Dice on inpainted and repainted cases, against the label maps that came out with them."""

    def of(operation: Operation) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            cases = bench.held_out
            given = [Case(*pair) for pair in zip(cases.images, cases.labels, strict=True)]
            drawn = [operation.parameters(seed) for seed in range(len(given))]
            made = [
                apply_to_cases(bench.generator, [parameters], [case], GRID.affine)[0]
                for parameters, case in zip(drawn, given, strict=True)
            ]
            images = torch.stack([case.image for case in made])
            labels = torch.stack([case.label for case in made if case.label is not None])
            return {
                **_who(cases),
                **_kept_and_shifted(bench.judge, images, labels),
                "dice_original": segmenter_dice(bench.judge, cases.images, cases.labels),
                "dice_labels": dice(labels, cases.labels, LABELS).tolist(),
                "changed": [
                    float((a != b).float().mean()) for a, b in zip(images, cases.images, strict=True)
                ],
            }

        return measure

    if _lacks_labels(bench):
        return []
    found: dict[str, Operation] = {
        f"inpainting-{region}": Inpainting(bench.generator, region) for region in get_args(Shape)
    }
    if bench.generator.card.label_volumes:
        found |= {f"repaint-{mm}mm": Repaint(bench.generator, mm) for mm in AMPLITUDES}
    return [Cell(f"operations/{name}", of(operation)) for name, operation in found.items()]


# -------- populations


def volumes(bench: Bench) -> list[Cell]:
    """Volumes of the labels, sampled against real."""

    def measure() -> dict[str, Any]:
        real, synthetic = bench.everyone, bench.synthetic
        result: dict[str, Any] = {"synthetic_cases": len(synthetic), "real_cases": len(real)}
        result |= _labelled_by(bench)
        voxel = float(np.prod(GRID.spacing))
        for label in LABELS:
            sizes = [
                ((cases.labels == label).flatten(1).sum(1) * voxel).tolist() for cases in (real, synthetic)
            ]
            result[f"label_{label}"] = {
                "real_mm3": sizes[0],
                "synthetic_mm3": sizes[1],
                "ks": ks_statistic(*sizes),
                "ks_null": ks_null(sizes[0], real.patients, len(synthetic))._asdict(),
            }
        return result

    return [Cell("volumes", measure)]


def neighbours(bench: Bench) -> list[Cell]:
    """Are samples nearer to training cases than to held-out ones? And the other training cases?"""

    def measure() -> dict[str, Any]:
        held_out, synthetic = bench.held_out, bench.synthetic
        known = bench.train.draw(len(held_out), seed=0)
        others = [i for i, patient in enumerate(bench.train.patients) if patient not in set(known.patients)]
        result: dict[str, Any] = {"training": list(known.names), "held_out": list(held_out.names)}
        result |= _labelled_by(bench)
        for space, describe in (("image", Cases.network_units), ("label", Cases.foreground)):
            sets = [
                describe(cases).flatten(1) for cases in (synthetic, bench.train.pick(others), known, held_out)
            ]
            for name, queries in (("synthetic", sets[0]), ("real", sets[1])):
                distances = [torch.cdist(queries, targets, p=1).numpy() for targets in sets[2:]]
                share = nearer_share_interval(*distances, known.patients, held_out.patients)
                result[f"{space}_{name}"] = {"queries": len(queries), **share._asdict()}
        return result

    return [Cell("neighbours", measure)]


# -------- time and memory


def speed(bench: Bench) -> list[Cell]:
    """Seconds a volume, where they go, the share of the matrix-product rate; memory of building."""

    def timed(run: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            run()
            counter = FlopCounterMode(display=False, custom_mapping=ONEDNN_FLOPS)
            with counter:
                run()
            with _Stopwatch(bench) as watch:
                run()
            rate = matrix_product_rate()
            sampling = bench.generator.card.sampling(
                "sample", bench.sampling["steps"], None, bench.sampling["sampler"]
            )
            return {
                **machine(),
                "batch": SPEED_BATCH,
                "sampler": sampling.sampler,
                "steps": sampling.steps,
                "seconds_per_volume": watch.total / SPEED_BATCH,
                "parts_seconds_per_volume": {
                    name: spent / SPEED_BATCH for name, spent in watch.parts.items()
                },
                "gflop_per_volume": counter.get_total_flops() / SPEED_BATCH / 1e9,
                "matrix_product_gflop_per_s": rate / 1e9,
                "fraction_of_matrix_product_rate": counter.get_total_flops() / watch.total / rate,
            }

        return measure

    def sampled() -> None:
        bench.generator.sample(SPEED_BATCH, **bench.sampling)

    def varied(spacing: float) -> Callable[[], None]:
        def run() -> None:
            cases = bench.train.pick(range(SPEED_BATCH))
            images, labels = cases.images, cases.labels
            if spacing != 1.0:
                images, labels = (
                    torch.nn.functional.interpolate(x.float(), scale_factor=1 / spacing, mode="nearest")
                    for x in (images, labels)
                )
            affine = np.diag([spacing, spacing, spacing, 1.0])
            bench.generator.vary(images, labels.short(), affine, **bench.sampling, **bench.drift)

        return run

    def memory() -> dict[str, Any]:
        peaks = {str(count): _peak_memory_of_building(str(bench.name), count) for count in BUILD_SIZES}
        return {"peak_mib_by_cases": peaks}

    cells = [
        Cell("speed/sample", timed(sampled)),
        Cell("speed/vary", timed(varied(1.0))),
        Cell("speed/vary-resampled", timed(varied(0.8))),
    ]
    return cells if _lacks_labels(bench) else [*cells, Cell("speed/memory", memory)]


class _Stopwatch:
    """Times a block, and in it the generator's networks; the rest is placing, resampling, intensities."""

    PARTS = (
        ("denoiser", "denoiser", "forward"),
        ("encoder", None, "encode_image"),
        ("decoder", None, "decode_image"),
        ("label encoder", None, "encode_label"),
        ("label decoder", None, "decode_label"),
    )

    def __init__(self, bench: Bench) -> None:
        self.model = bench.generator.model
        self.parts = {name: 0.0 for name, _, _ in self.PARTS}
        self.total = 0.0

    def __enter__(self) -> "_Stopwatch":
        for name, module, method in self.PARTS:
            owner = getattr(self.model, module) if module else self.model
            setattr(owner, method, self._timed(name, getattr(owner, method)))
        self.start = perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.total = perf_counter() - self.start
        self.parts["placing, resampling, intensities"] = self.total - sum(self.parts.values())
        for _, module, method in self.PARTS:
            delattr(getattr(self.model, module) if module else self.model, method)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[name] += perf_counter() - start

        return run


def matrix_product_rate(size: int = 4096, repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product in the fastest of float32 and bfloat16."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size, size, dtype=dtype)
        a @ b
        start = perf_counter()
        for _ in range(repeats):
            a @ b
        rates.append(2 * size**3 * repeats / (perf_counter() - start))
    return max(rates)


def _peak_memory_of_building(generator: str, cases: int) -> float:
    """Peak resident memory (MiB) of `diffaug build` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "build",
            generator,
            "--cases",
            str(cases),
            "--output",
            str(Path(folder) / "Dataset901_Synthetic"),
        ]
        code = (
            "import resource, sys\nfrom diffaug.cli import app\n"
            f"app({command!r}, standalone_mode=False)\n"
            "sys.stderr.write(f'\\n{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}')"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stderr.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


# -------- shared pieces


def _lacks_labels(bench: Bench) -> bool:
    return bench.name is not None and not bench.generator.knows_labels


def _labelled_by(bench: Bench) -> dict[str, str]:
    """Says so where the label maps of samples are not the generator's own."""
    return {"labelled_by": "judge"} if bench.judged else {}


def _who(cases: Cases) -> dict[str, Any]:
    return {"cases": list(cases.names), "patients": list(cases.patients)}


def segmenter_dice(model: Segmenter, images: Tensor, labels: Tensor) -> list[list[float]]:
    """Dice of the segmenter on images in any units, per case and label."""
    return dice(predict(model, standardise(images)), labels, LABELS).tolist()


def _kept_and_shifted(model: Segmenter, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Dice against the label maps and, as a control, against them shifted by a voxel (mean of three axes)."""
    predicted = predict(model, standardise(images))
    shifted = [dice(predicted, labels.roll(1, axis), LABELS) for axis in (2, 3, 4)]
    return {
        "dice": dice(predicted, labels, LABELS).tolist(),
        "dice_shifted": torch.stack(shifted).mean(0).tolist(),
    }


def _psnr(original: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio (dB) in network units, whose range of -1 to 1 is the peak."""
    return float(10 * torch.log10(4 / (original - other).square().mean()))


def _psnr_between_patients(cases: Cases) -> float:
    """Median PSNR of one patient's scan as a reconstruction of another's."""
    volumes = cases.network_units()
    return float(np.median([_psnr(volumes[i], volumes[j]) for i, j in _pairs_of_patients(cases.patients)]))


def _distances_between_patients(volumes: Tensor, patients: tuple[str, ...]) -> list[float]:
    """Mean absolute differences of all pairs of volumes of different patients, network units."""
    return [float((volumes[i] - volumes[j]).abs().mean()) for i, j in _pairs_of_patients(patients)]


def _pairs_of_patients(patients: tuple[str, ...]) -> list[tuple[int, int]]:
    count = len(patients)
    return [(i, j) for i in range(count) for j in range(i) if patients[i] != patients[j]]


FIGURES = {
    "latent": latent,
    "reconstruction": reconstruction,
    "utility": utility,
    "paint": paint,
    "vary": vary,
    "operations": operations,
    "volumes": volumes,
    "neighbours": neighbours,
    "few_labels": few_labels,
    "speed": speed,
}
