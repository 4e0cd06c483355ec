"""Builds whose candidates are looked at: refused ones are made again, and the manifest says so."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from diffaug.datasets.building import build_dataset
from diffaug.datasets.inspecting import MOST_CANDIDATES, candidate_seed
from diffaug.datasets.manifest import InspectionRecord, read_manifest
from diffaug.datasets.resuming import STATE
from diffaug.datasets.writing import Made
from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.seeds import case_seed

FAST = {"steps": 1, "layout": "decathlon"}


class Dark:
    """Refuses images whose mean lies below a level."""

    def __init__(self, level: float) -> None:
        self.level = level
        self.seen = 0

    @property
    def record(self) -> InspectionRecord:
        return InspectionRecord(
            detector="0" * 64,
            segmenter=None,
            checks={"dark": f"darker than {self.level}", "never": "nothing"},
            real={"dark": 0.1, "never": None},
        )

    def refuse(self, candidates: Sequence[Made]) -> list[list[str]]:
        self.seen += len(candidates)
        return [["dark"] if made.image.mean() < self.level else [] for made in candidates]


@pytest.fixture(scope="module")
def level(tiny_generator: Generator) -> float:
    """A level that about half of the tiny generator's samples lie below."""
    means = tiny_generator.sample(8, seed=[case_seed(0, n) for n in range(8)], steps=1).image.mean(
        (1, 2, 3, 4)
    )
    return float(means.median())


def test_refused_candidates_are_made_again_with_the_next_seed(
    tiny_generator: Generator, level: float, tmp_path: Path
) -> None:
    inspector = Dark(level)
    done = build_dataset(tiny_generator, tmp_path / "d", cases=6, inspector=inspector, **FAST)
    manifest = read_manifest(tmp_path / "d" / "manifest.json")
    assert manifest.inspected is not None
    assert 0 < manifest.inspected.rejected["dark"] == manifest.inspected.candidates - 6 == inspector.seen - 6
    assert done.rejected == manifest.inspected.rejected == {"dark": inspector.seen - 6, "never": 0}
    refused = 0
    for index, case in enumerate(manifest.cases):
        assert case.rejected == [], "which candidates were refused stays in the house"
        seeds = [candidate_seed(0, index, attempt) for attempt in range(MOST_CANDIDATES)]
        refused += seeds.index(case.seed)
        image = tiny_generator.sample(1, seed=[case.seed], steps=1).image
        assert float(image.mean()) >= level
    assert refused == inspector.seen - 6
    assert "refused were" in (tmp_path / "d" / "README.md").read_text()
    text = (tmp_path / "d" / "README.md").read_text()
    assert "--reject-copies --detector DETECTOR --output" in text
    assert f"DETECTOR is the file with the SHA-256 {'0' * 64}" in text
    assert "SEGMENTER" not in text


def test_bytes_do_not_depend_on_batches_or_interruptions(
    tiny_generator: Generator, level: float, tmp_path: Path
) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    class Interrupted(Dark):
        def refuse(self, candidates: Sequence[Made]) -> list[list[str]]:
            if self.seen > 3:
                raise KeyboardInterrupt
            return super().refuse(candidates)

    build_dataset(tiny_generator, tmp_path / "a" / "d", cases=6, inspector=Dark(level), batch_size=6, **FAST)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(
            tiny_generator, tmp_path / "b" / "d", cases=6, inspector=Interrupted(level), batch_size=2, **FAST
        )
    assert (tmp_path / "b" / "d" / STATE).is_file()
    build_dataset(tiny_generator, tmp_path / "b" / "d", cases=6, inspector=Dark(level), batch_size=2, **FAST)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_repaired_dataset_keeps_its_numbers(
    tiny_generator: Generator, level: float, tmp_path: Path
) -> None:
    def build() -> bytes:
        build_dataset(tiny_generator, tmp_path / "d", cases=6, inspector=Dark(level), **FAST)
        return (tmp_path / "d" / "manifest.json").read_bytes()

    before = build()
    next((tmp_path / "d" / "imagesTr").iterdir()).unlink()
    assert build() == before


def test_the_first_candidate_has_the_seed_of_an_uninspected_case() -> None:
    assert candidate_seed(3, 5, 0) == case_seed(3, 5)
    assert len({candidate_seed(3, 5, attempt) for attempt in range(MOST_CANDIDATES)}) == MOST_CANDIDATES


def test_a_generator_that_always_fails_ends_the_build(tiny_generator: Generator, tmp_path: Path) -> None:
    inspector = Dark(1e9)
    with pytest.raises(DiffaugError, match=f"all {MOST_CANDIDATES} candidates for case 0 .* dark"):
        build_dataset(tiny_generator, tmp_path / "d", cases=1, inspector=inspector, **FAST)
    assert inspector.seen == MOST_CANDIDATES


def test_good_cases_of_a_batch_are_kept_where_another_has_no_candidate(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    class Hopeless(Dark):
        def refuse(self, candidates: Sequence[Made]) -> list[list[str]]:
            first = not self.seen
            self.seen += len(candidates)
            return [["dark"] if not first or n == 1 else [] for n in range(len(candidates))]

    with pytest.raises(DiffaugError, match=r"candidates for case 1 were rejected .* another --seed"):
        build_dataset(tiny_generator, tmp_path / "d", cases=3, inspector=Hopeless(0), **FAST)
    assert len(list((tmp_path / "d" / "imagesTr").glob("tiny*"))) == 2


def test_another_inspection_is_another_build(tiny_generator: Generator, level: float, tmp_path: Path) -> None:
    build_dataset(tiny_generator, tmp_path / "d", cases=1, inspector=Dark(-1e9), **FAST)
    with pytest.raises(DiffaugError, match=r"inspection\.checks\.dark"):
        build_dataset(tiny_generator, tmp_path / "d", cases=1, inspector=Dark(level), **FAST)


def test_without_an_inspection_the_dataset_says_so(tiny_generator: Generator, tmp_path: Path) -> None:
    build_dataset(tiny_generator, tmp_path / "d", cases=1, **FAST)
    manifest = read_manifest(tmp_path / "d" / "manifest.json")
    assert manifest.inspected is None
    assert manifest.audit is None
    text = (tmp_path / "d" / "README.md").read_text()
    assert "Candidates were not inspected for copies" in text
    assert "Audit of the generator: none" in text


def test_variations_are_not_inspected(tiny_generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match="vary makes cases that resemble their sources"):
        build_dataset(
            tiny_generator, tmp_path / "d", cases=1, verb="vary", source=tmp_path, inspector=Dark(0), **FAST
        )
