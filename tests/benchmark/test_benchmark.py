"""The benchmark: what it refuses, that its cells are reproducible and resumable, and what it concludes."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from diffaug.benchmark.analysis import summarise
from diffaug.benchmark.cells import CaseScore, Cell, CellResult, is_done, read_cell, run_cell
from diffaug.benchmark.config import Benchmark, read_benchmark
from diffaug.benchmark.pools import pretraining_cases
from diffaug.benchmark.report import write_report
from diffaug.benchmark.running import all_cells, outline, run_cells
from diffaug.benchmark.study import Study, draw_labelled, open_study
from diffaug.datasets.training_scans import record_training_scans
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DatasetError, DiffaugError, LeakError
from diffaug.files import atomic_write_json
from diffaug.progress import Progress
from tests.conftest import make_tiny_generator

QUIET = Progress(quiet=True)
SPLIT = {
    "train": [f"case_{n}" for n in range(6)],
    "validation": ["case_6"],
    "test": ["case_7", "case_8", "case_9"],
}


def write_dataset(folder: Path, *, patients: list[str] | None = None) -> Path:
    """Ten cases of two blocks; two cases a patient unless patients are given."""
    for n in range(10):
        label = np.zeros((18, 22, 16), np.uint8)
        label[5:12, 5:11, 4:12], label[5:12, 11 : 17 - n % 3, 4:12] = 1, 2
        image = np.random.default_rng(n).normal(200 * label, 40).astype(np.float32)
        for kind, array in (("images", image), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            file = folder / kind / f"case_{n}.nii.gz"
            nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 1.5, 1])), file)
    names = patients or [f"patient {n if n > 5 else n // 2}" for n in range(10)]
    rows = [f"case_{n},{name}" for n, name in enumerate(names)]
    (folder / "patients.csv").write_text("\n".join(["case,patient", *rows]) + "\n")
    (folder / "splits.json").write_text(json.dumps(SPLIT))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "blocks")


def config(generator: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "blocks",
        "generator": str(generator),
        "network": {"kind": "dynunet", "settings": {"filters": [4, 8, 16]}},
        "space": {"spacing": [1.5, 1.5, 1.5], "patch": [16, 24, 16]},
        "labelled": [2],
        "seeds": 1,
        "schedule": {"steps": 4, "learning_rate": 0.01},
        "comparator": "matched",
        "ceiling": "all-labels",
        "arms": {
            "matched": {"title": "from scratch", "steps": 8},
            "plain": {"augmentation": False},
            "variation": {
                "steps": 8,
                "transforms": [
                    {"operation": "variation", "probability": 0.4, "variants": 2},
                    {"operation": "repaint", "probability": 0.4, "variants": 2},
                ],
            },
            "pairs": {"pretraining": [{"method": "supervised", "steps": 4, "cases": 3}]},
            "both": {
                "pretraining": [
                    {"method": "masked", "data": "real", "steps": 2},
                    {"method": "supervised", "steps": 2, "cases": 3},
                ]
            },
            "all-labels": {"labels": "all", "steps": 8},
        },
        "comparisons": [{"arm": "pairs", "reference": "matched", "margin": 0.9}],
    } | changes


def study(dataset: Path, generator: Path, work: Path, **changes: Any) -> Study:
    return open_study(Benchmark.model_validate(config(generator, **changes)), dataset, work)


def decided(result: CellResult) -> dict[str, Any]:
    """A result without what a clock says."""
    return result.model_dump(exclude={"seconds", "threads"})


# -- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comparator": "other"}, r"other is no arm; the arms are .*matched"),
        ({"labelled": []}, "labelled"),
        ({"labelled": [0]}, "at least 1"),
        ({"labelled": [2, 2]}, "twice"),
        ({"comparator": "all-labels"}, "must have few labels"),
        ({"ceiling": "pairs"}, "must have all labels"),
        ({"comparisons": [{"arm": "pairs", "reference": "all-labels", "margin": 0.1}]}, "of few labels"),
        ({"backend": "nnunet"}, "nnU-Net plans network and space"),
        (
            {"arms": {"matched": {"step": 3}}, "ceiling": None, "comparisons": []},
            r"arms.matched.step: there is no such key; there are title, labels, steps, .*seeds",
        ),
        ({"schedule": {"stepz": 3}}, r"schedule.stepz: there is no such key; there are steps, batch"),
        ({"seed": 3}, r"benchmark: seed: there is no such key; there are name, .*comparisons"),
        ({"subset": "tests"}, "subset: .*'test', not 'tests'"),
        ({"name": "../elsewhere"}, "is no name"),
        ({"network": {"kind": "transformer"}}, "network.kind"),
    ],
)
def test_mistakes_in_the_file_are_named(
    change: dict[str, Any], message: str, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "benchmark.yaml"
    file.write_text(yaml.safe_dump(config(tiny_generator_folder, **change)))
    with pytest.raises(DiffaugError, match=message):
        read_benchmark(file)


def test_probabilities_of_an_arm_are_shares(tiny_generator_folder: Path, tmp_path: Path) -> None:
    content = config(tiny_generator_folder)
    content["arms"]["variation"]["transforms"][0]["probability"] = 0.7
    file = tmp_path / "benchmark.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(DiffaugError, match="sum to more than 1"):
        read_benchmark(file)
    file.write_text("name: [")
    with pytest.raises(DiffaugError, match="cannot be read as YAML"):
        read_benchmark(file)
    file.write_text("")
    with pytest.raises(DiffaugError, match=r"it holds None, not keys such as name"):
        read_benchmark(file)
    file.write_text("!!python/object/apply:os.system [echo]")
    with pytest.raises(DiffaugError, match="cannot be read as YAML"):
        read_benchmark(file)


def test_a_patient_on_both_sides_stops_it(tiny_generator_folder: Path, tmp_path: Path) -> None:
    patients = [f"patient {n}" for n in range(9)] + ["patient 0"]
    data = write_dataset(tmp_path / "data", patients=patients)
    with pytest.raises(DatasetError, match="patient 0"):
        study(data, tiny_generator_folder, tmp_path / "work")


def test_a_scored_scan_that_trained_the_generator_stops_it(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    generator = shutil.copytree(tiny_generator_folder, tmp_path / "generator")
    trained = CaseFiles("renamed", (dataset / "images" / "case_8.nii.gz",), None, "renamed")
    record = record_training_scans([trained], QUIET)
    atomic_write_json(generator / "private" / "training_scans.json", record)
    with pytest.raises(LeakError, match=r"1 of 3 held-out scans.*under `train` in splits.json"):
        study(dataset, generator, tmp_path / "work")
    only_real = config(generator)["arms"]
    arms = {name: only_real[name] for name in ("matched", "all-labels")}
    study(dataset, generator, tmp_path / "work", arms=arms, comparisons=[])


def test_what_the_dataset_must_have(dataset: Path, tiny_generator_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    with pytest.raises(DatasetError, match="6 labelled training cases, the benchmark asks for 7"):
        study(data, tiny_generator_folder, tmp_path / "work", labelled=[7])
    space = {"spacing": [1.5, 1.5, 1.5], "patch": [16, 22, 16]}
    with pytest.raises(DiffaugError, match="multiples of"):
        study(data, tiny_generator_folder, tmp_path / "work", space=space)
    (data / "splits.json").unlink()
    with pytest.raises(DatasetError, match=r"has no splits.json"):
        study(data, tiny_generator_folder, tmp_path / "work")


def test_mistakes_are_found_before_anything_is_trained(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    content = config(tiny_generator_folder)
    content["arms"]["variation"]["transforms"][0]["ranges"] = {"strenght": 0.5}
    with pytest.raises(
        DiffaugError, match=r"arm variation, variation: there is no strenght; there are .*strength"
    ):
        open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    content = config(tiny_generator_folder)
    content["arms"]["pairs"]["pretraining"][0]["data"] = str(tmp_path / "syntetic")
    with pytest.raises(DiffaugError, match="syntetic is not a folder"):
        open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    with pytest.raises(DiffaugError, match="cannot be built"):
        study(dataset, tiny_generator_folder, tmp_path / "work", network={"settings": {"filters": [4, 8]}})


def test_data_to_pretrain_on_must_not_show_a_scored_scan(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for kind in ("images", "labels"):
        (other / kind).mkdir(parents=True)
        for n, name in enumerate(("case_0", "case_8")):
            shutil.copy(dataset / kind / f"{name}.nii.gz", other / kind / f"renamed_{n}.nii.gz")
    content = config(tiny_generator_folder)
    content["arms"]["pairs"]["pretraining"][0]["data"] = str(other)
    with pytest.raises(LeakError, match=r"1 cases of .*other are among the 3 scored"):
        open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    split = {"train": ["renamed_0"], "validation": [], "test": ["renamed_1"]}
    (other / "splits.json").write_text(json.dumps(split))
    own = open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    stage = own.benchmark.arms["pairs"].pretraining[0]
    assert [case.name for case in pretraining_cases(own, stage, 0, QUIET)] == ["renamed_0"]


def test_labels_are_matched_by_name(dataset: Path, tmp_path: Path) -> None:
    """A generator whose ids are the other way round."""
    data = shutil.copytree(dataset, tmp_path / "data")
    for old, new in (("images", "imagesTr"), ("labels", "labelsTr")):
        (data / old).rename(data / new)
    names = [f"case_{n}" for n in range(10)]
    files = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    labels = {"0": "background", "1": "head", "2": "body"}
    described = {"name": "blocks", "modality": {"0": "MRI"}, "labels": labels, "training": files}
    (data / "dataset.json").write_text(json.dumps(described))
    make_tiny_generator(labels={0: "background", 1: "body", 2: "head"}).save(tmp_path / "generator")
    own = study(data, tmp_path / "generator", tmp_path / "work")
    assert own.classes_of(own.card.labels) == {0: 0, 1: 2, 2: 1}
    assert own.label_mapping == {1: 2, 2: 1}
    run_cell(own, Cell(2, "variation", 0), QUIET)
    make_tiny_generator(labels={0: "background", 1: "liver"}).save(tmp_path / "liver")
    with pytest.raises(DiffaugError, match="does not know head, body"):
        study(data, tmp_path / "liver", tmp_path / "work")


# -- who is labelled


def test_patients_stay_together() -> None:
    cases = [CaseFiles(f"{n}", (), None, f"patient {n // 2}") for n in range(12)]
    cases += [CaseFiles(f"single {n}", (), None, f"single {n}") for n in range(5)]
    seen = set()
    for seed in range(20):
        drawn = draw_labelled(cases, 4, seed)
        assert len(drawn) == 4
        for case in drawn:
            own = {other.name for other in cases if other.patient == case.patient}
            assert own <= {other.name for other in drawn}
        assert draw_labelled(cases, 4, seed) == drawn
        seen.add(tuple(sorted(case.name for case in drawn)))
    assert len(seen) > 10
    pairs = cases[:12]
    with pytest.raises(DatasetError, match="no patients have 3 cases together"):
        draw_labelled(pairs, 3, 0)


# -- cells


def test_all_arms_run_once_and_are_kept(dataset: Path, tiny_generator_folder: Path, tmp_path: Path) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work")
    cells = all_cells(own.benchmark)
    assert [cell.arm for cell in cells] == list(own.benchmark.arms)
    assert outline(own, cells)[-1] == "6 of 6 cells are to be run, 44 steps in all."
    assert not own.work.exists()
    assert run_cells(own, cells[:4], 1, QUIET) == 4
    assert "| 2 | matched | 8 | 0 |" in outline(own, cells)
    assert run_cells(own, cells, 1, QUIET) == 2
    before = {cell: cell.file(own.work).read_bytes() for cell in cells}
    assert run_cells(own, cells, 1, QUIET) == 0
    assert before == {cell: cell.file(own.work).read_bytes() for cell in cells}

    results = {cell.arm: read_cell(cell.file(own.work)) for cell in cells}
    few = {tuple(r.labelled_cases) for arm, r in results.items() if arm != "all-labels"}
    assert len(few) == 1
    assert len(results["all-labels"].labelled_cases) == 6
    for result in results.values():
        assert [score.case for score in result.scores] == SPLIT["test"]
        assert all(0 <= score.mean() <= 1 for score in result.scores)
    assert results["pairs"].loaded is not None
    assert "left" not in (results["pairs"].loaded or "")
    assert len(results["both"].pretraining_losses) == 2
    assert len({json.dumps([s.model_dump() for s in r.scores]) for r in results.values()}) == 6

    summary = summarise(own, cells)
    assert summary.missing == 0
    assert summary.margins[0].met
    page = write_report(own, summary, cells).read_text()
    assert "from scratch" in page
    assert page.count("data:image/png;base64") == 1 + 6
    assert (own.work / "dice.png").stat().st_size > 5000
    rows = (own.work / "cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 * 3 * 2
    table = (own.work / "table.md").read_text()
    assert "| 2 | pairs (its generator saw 0 labelled cases) | 8 |" in table


def test_titles_say_how_many_labels_the_generator_saw(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    generator = tmp_path / "generator"
    shutil.copytree(tiny_generator_folder, generator)
    card = json.loads((generator / "card.json").read_text())
    card["training"] |= {"cases": {"train": 144}, "labelled": 8}
    (generator / "card.json").write_text(json.dumps(card))
    own = study(dataset, generator, tmp_path / "work")
    run_cells(own, [Cell(2, "matched", 0), Cell(2, "pairs", 0)], 1, QUIET)
    knew = {arm.arm: arm.knew for arm in summarise(own, all_cells(own.benchmark)).arms}
    assert knew == {"matched": "", "pairs": "its generator saw 144 images, 8 of them with labels"}


def test_a_cell_depends_on_nothing_but_itself(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    """Other order, other cells, other processes: the same result."""
    results = []
    for name, order in (("first", ["variation", "both"]), ("second", ["both", "pairs", "variation"])):
        own = study(dataset, tiny_generator_folder, tmp_path / name)
        results.append({arm: decided(run_cell(own, Cell(2, arm, 0), QUIET)) for arm in order})
    assert results[0]["variation"] == results[1]["variation"]
    assert results[0]["both"] == results[1]["both"]
    own = study(dataset, tiny_generator_folder, tmp_path / "first")
    other = run_cell(own, Cell(2, "variation", 1), QUIET)
    assert decided(other)["scores"] != results[0]["variation"]["scores"]


@pytest.mark.slow
def test_cells_run_in_several_processes(dataset: Path, tiny_generator_folder: Path, tmp_path: Path) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work", seeds=2)
    cells = all_cells(own.benchmark)
    assert run_cells(own, cells, 2, QUIET) == len(cells) == 12
    assert all(cell.file(own.work).exists() for cell in cells)


def test_cells_of_other_settings_are_not_mixed(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work")
    cell = Cell(2, "matched", 0)
    run_cell(own, cell, QUIET)
    assert is_done(own, cell)
    changed = study(dataset, tiny_generator_folder, tmp_path / "work", schedule={"steps": 9})
    with pytest.raises(DiffaugError, match=r"made by other settings.*learning_rate"):
        is_done(changed, cell)
    cell.file(own.work).write_text("{}")
    with pytest.raises(DiffaugError, match="or damaged: remove it"):
        is_done(own, cell)


# -- what it concludes


def write_cells(own: Study, gains: dict[str, float], noise: float) -> list[Cell]:
    """Results as if arms differed from one another by so much Dice."""
    rng = np.random.default_rng(0)
    cells = all_cells(own.benchmark)
    base = rng.uniform(0.6, 0.8, 3)
    for cell in cells:
        values = base + gains.get(cell.arm, 0.0) + rng.normal(0, noise, 3)
        scores = [
            CaseScore(
                case=name,
                patient=f"patient {n}",
                dice={"label 1": float(values[n])},
                nsd={"label 1": 0.5},
                hd95={"label 1": 2.0},
            )
            for n, name in enumerate(SPLIT["test"])
        ]
        result = CellResult(
            settings=own.settings(own.benchmark.arms[cell.arm], cell.labelled, cell.seed),
            labelled_cases=[],
            scores=scores,
            losses=[],
            pretraining_losses=[],
            loaded=None,
            seconds={},
            threads=1,
        )
        atomic_write_json(cell.file(own.work), result.model_dump(mode="json"))
    return cells


def test_gains_losses_and_neither_are_told_apart(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work", seeds=5)
    cells = write_cells(own, {"pairs": 0.05, "plain": -0.1, "all-labels": 0.1}, noise=0.002)
    summary = summarise(own, cells)
    arms = {arm.arm: arm for arm in summary.arms}
    assert arms["pairs"].verdict == "gain"
    assert arms["plain"].verdict == "loss"
    assert arms["variation"].verdict == "no gain"
    assert arms["matched"].gain is None
    pairs = arms["pairs"]
    assert pairs.gain is not None
    assert pairs.share is not None
    assert pairs.gain.value == pytest.approx(0.05, abs=0.003)
    assert pairs.gain.low < pairs.gain.value < pairs.gain.high
    assert pairs.share.value == pytest.approx(0.5, abs=0.05)
    assert pairs.holm is not None
    assert pairs.p is not None
    assert pairs.holm >= pairs.p
    assert pairs.steps == 8
    page = write_report(own, summary, cells).read_text()
    assert "Against <b>from scratch</b>, 8 steps in all" in page
    assert "<b>plain</b>, with 4 steps instead of 8, lowers Dice" in page


def test_two_seeds_are_too_few_to_say_anything(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work", seeds=2)
    summary = summarise(own, write_cells(own, {"pairs": 0.05}, noise=0.001))
    assert {arm.verdict for arm in summary.arms} == {"", "fewer than 3 seeds"}


def test_old_results_are_not_shown_under_new_settings(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work")
    cells = write_cells(own, {}, noise=0.01)
    changed = study(dataset, tiny_generator_folder, tmp_path / "work", schedule={"steps": 5000})
    with pytest.raises(DiffaugError, match="made by other settings"):
        summarise(changed, cells)


def test_variants_leave_all_other_randomness_as_it_is(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    """Variants of strength 0 are the cases themselves: the arm is its comparator."""
    content = config(tiny_generator_folder)
    use = {"operation": "variation", "probability": 1, "variants": 1, "ranges": {"strength": 0}}
    content["arms"]["variation"]["transforms"] = [use]
    own = open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    scores = [run_cell(own, Cell(2, arm, 0), QUIET).scores for arm in ("matched", "variation")]
    assert scores[0] == scores[1]


def test_without_a_gap_there_is_no_share_of_it(
    dataset: Path, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    own = study(dataset, tiny_generator_folder, tmp_path / "work", seeds=3)
    cells = write_cells(own, {"pairs": 0.05, "all-labels": -0.01}, noise=0.01)
    cells[-1].file(own.work).unlink()
    summary = summarise(own, cells)
    assert all(arm.share is None for arm in summary.arms)
    assert summary.missing == 1
    assert "Not finished" in write_report(own, summary, cells).read_text()


# -- nnU-Net


@pytest.mark.slow
def test_cells_by_real_nnunet(dataset: Path, tiny_generator_folder: Path, tmp_path: Path) -> None:
    """Plans once; trains from scratch, with a bank, and from weights that diffaug pretrained."""
    arms = {
        "matched": {"steps": 2},
        "variation": {
            "steps": 2,
            "transforms": [{"operation": "variation", "probability": 0.5, "variants": 2}],
        },
        "images": {"steps": 1, "pretraining": [{"method": "masked", "steps": 1, "cases": 2}]},
    }
    changes: dict[str, Any] = {"backend": "nnunet", "arms": arms, "ceiling": None, "comparisons": []}
    content = config(tiny_generator_folder) | changes
    del content["network"], content["space"]
    own = open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    assert own.network.kind == "nnunet"
    cells = all_cells(own.benchmark)
    assert run_cells(own, cells, 1, QUIET) == 3
    again = open_study(Benchmark.model_validate(content), dataset, tmp_path / "work")
    assert run_cells(again, cells, 1, QUIET) == 0
    for cell in cells:
        result = read_cell(cell.file(own.work))
        assert [score.case for score in result.scores] == SPLIT["test"]
    assert summarise(own, cells).missing == 0
    assert not any((tmp_path / "work" / "nnunet" / "cells").iterdir())
