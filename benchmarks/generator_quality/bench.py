"""What the figures share: data, generator, sampled pairs and trained segmenters, each made once and kept."""

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cases import GRID, Cases, read_cases
from safetensors.torch import load_file, save_file

from diffaug.evaluation import augmentation, segmenter
from diffaug.evaluation.segmenter import LEARNING_RATE, Segmenter, fit_segmenter, predict, standardise
from diffaug.files import atomic_path, sha256_file
from diffaug.generators.generator import Generator
from diffaug.generators.seeds import case_seed
from diffaug.zoo import load

CLASSES = 3
# Training steps of a segmenter: see the rows of the table with twice as many.
STEPS = 12000
# Sampled pairs are kept in files of this many, so that little is lost when a run is stopped.
PAIRS_PER_FILE = 20


@dataclass(frozen=True)
class Cell:
    """One measurement: its name, the function that makes it, and what its figures depend on.

    `of_generator` says whether they depend on the generator, `settings` holds constants of this cell alone.
    """

    name: str
    measure: Callable[[], dict[str, Any]]
    of_generator: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Everything a figure may ask for.

    Args:
        generator: name of a bundled generator or folder of one; None where only real cases are measured.
        subset: the held-out cases, "validation" or "test".
        data: folder that holds `Task04_Hippocampus`.
        work: folder for sampled pairs and trained segmenters.
        steps: training steps of a segmenter.
        pairs: number of sampled pairs.
        seeds: number of repetitions of a training.
        sampler, sampler_steps: how pairs are sampled; the card's own unless given.
        judged: whether the label maps of sampled images are the judge's, rather than the generator's own. So
            it always is for a generator that knows no labels.
    """

    def __init__(
        self,
        generator: str | None,
        subset: str,
        data: Path,
        work: Path,
        steps: int,
        pairs: int,
        seeds: int,
        sampler: str | None = None,
        sampler_steps: int | None = None,
        judged: bool = False,
    ) -> None:
        self.name = generator
        self.subset = subset
        self.data = data
        self.work = work
        self.steps = steps
        self.pairs = pairs
        self.seeds = range(seeds)
        self.sampling = {"sampler": sampler, "steps": sampler_steps}
        self.asked_for_judge = judged

    @cached_property
    def generator(self) -> Generator:
        """The generator that is measured."""
        if self.name is None:
            raise SystemExit("this figure needs a generator: give --generator a name or a folder")
        generator = load(self.name)
        if generator.grid != GRID:
            raise SystemExit(f"{self.name} works on {generator.grid}, the benchmark on {GRID}")
        return generator

    @cached_property
    def generator_hash(self) -> str | None:
        """Identity of the generator: its weights, the settings that its verbs use unasked, and the judge
        where that labels what is sampled."""
        if self.name is None:
            return None
        identity = f"{self.generator.weights_hash} {self.generator.card.defaults.model_dump_json()}"
        given = {name: value for name, value in self.sampling.items() if value is not None}
        if self.judged:
            given["judge"] = f"{self.segmenter_hash}, {self.steps} steps"
        if given:
            identity += f" {json.dumps(given, sort_keys=True)}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @cached_property
    def judged(self) -> bool:
        """Whether the judge labels what is sampled."""
        return self.asked_for_judge or not self.generator.knows_labels

    @property
    def drift(self) -> dict[str, bool]:
        """What `vary` has to be told by a generator that cannot preserve a label."""
        return {} if self.generator.knows_labels else {"allow_label_drift": True}

    @cached_property
    def segmenter_hash(self) -> str:
        """Identity of the reference segmenter: a hash of the code that trains it."""
        files = (segmenter.__file__, augmentation.__file__)
        return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()[:16]

    @cached_property
    def train(self) -> Cases:
        """The cases that may fit weights."""
        return read_cases(self.data, ["train"])

    @cached_property
    def held_out(self) -> Cases:
        """The cases that everything is measured on."""
        return read_cases(self.data, [self.subset])

    @cached_property
    def everyone(self) -> Cases:
        """All real cases; those of the test subset only where the test subset is measured."""
        return read_cases(self.data, ["train", "validation", *(["test"] if self.subset == "test" else [])])

    @cached_property
    def synthetic(self) -> Cases:
        """The sampled pairs; pair k depends on the generator and on k alone."""
        folder = self.work / "pairs" / str(self.generator_hash)
        images, labels = [], []
        for start in range(0, self.pairs, PAIRS_PER_FILE):
            file = folder / f"{start:05d}.safetensors"
            if not file.exists():
                seeds = [case_seed(0, index) for index in range(start, start + PAIRS_PER_FILE)]
                sample = self.generator.sample(PAIRS_PER_FILE, seed=seeds, **self.sampling)
                label = sample.label
                if self.judged:
                    label = predict(self.judge, standardise(sample.image)).short()
                with atomic_path(file) as temporary:
                    save_file({"images": sample.image.contiguous(), "labels": label.contiguous()}, temporary)
                say(f"sampled {start + PAIRS_PER_FILE} pairs")
            tensors = load_file(file)
            images.append(tensors["images"])
            labels.append(tensors["labels"])
        names = tuple(f"synthetic_{index:05d}" for index in range(self.pairs))
        return Cases(names, names, torch.cat(images)[: self.pairs], torch.cat(labels)[: self.pairs])

    def segmenter(self, kind: str, count: int, seed: int, steps: int | None = None) -> Segmenter:
        """The reference segmenter trained on `count` cases.

        Args:
            kind: "real" draws the cases from the training cases, patient by patient; "synthetic" takes the
                sampled pairs.
            count: number of cases.
            seed: of the draw and the training.
            steps: training steps; the benchmark's own unless given.
        """
        steps = self.steps if steps is None else steps
        name = f"{kind}-{count}-seed{seed}-steps{steps}"
        if kind == "synthetic":
            return self.kept(f"{name}-{self.generator_hash}", self.synthetic, seed=seed, steps=steps)
        return self.kept(name, self.train.draw(count, seed), seed=seed, steps=steps)

    def kept(
        self,
        name: str,
        cases: Cases,
        *,
        seed: int,
        steps: int,
        start: Segmenter | None = None,
        learning_rate: float = LEARNING_RATE,
    ) -> Segmenter:
        """A segmenter trained on `cases`, or the one that an earlier run kept under this name."""
        file = self.work / "segmenters" / self.segmenter_hash / f"{name}.safetensors"
        if not file.exists():
            say(f"training {name}")
            model = fit_segmenter(
                cases.standardised(),
                cases.labels,
                steps=steps,
                seed=seed,
                classes=CLASSES,
                start=start,
                learning_rate=learning_rate,
            )
            with atomic_path(file) as temporary:
                save_file(model.state_dict(), temporary)
        model = Segmenter(1, CLASSES)
        model.load_state_dict(load_file(file))
        return model.eval().requires_grad_(False)

    @cached_property
    def judge(self) -> Segmenter:
        """The segmenter trained on all real training cases, which judges images."""
        return self.segmenter("real", len(self.train), seed=0)


def say(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a measured time depends on."""
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
