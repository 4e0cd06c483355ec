"""The report of the generator benchmark, on made-up cells."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "generator_quality"
PATIENTS = [f"P{number // 2}" for number in range(8)]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator_quality_report", BENCHMARK / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(mean: float, seed: int = 0) -> list[list[float]]:
    """Dice of 8 cases and 2 labels around `mean`."""
    spread = np.random.default_rng(seed).normal(0, 0.01, (8, 2))
    return (mean + spread - spread.mean()).tolist()


def cells() -> dict[str, dict[str, Any]]:
    """Measurements of a generator that meets some targets and misses others."""
    who = {"patients": PATIENTS}
    found: dict[str, dict[str, Any]] = {
        "latent": {"latent_numbers": 11200, "voxels": 89600},
        "paint": {**who, "dice_original": scores(0.85), "dice_painted": scores(0.90)},
        "vary/originals": {
            **who,
            "dice": scores(0.85),
            "dice_shifted": scores(0.80),
            "distances_between_patients": [0.2, 0.3, 0.4],
        },
        "volumes": {
            "synthetic_cases": 5,
            "real_cases": 4,
            **{
                label: {
                    "real_mm3": [1.0, 2.0, 3.0, 4.0],
                    "synthetic_mm3": [2.0, 2.0, 3.0, 4.0, 4.0],
                    "ks": statistic,
                    "ks_null": {"value": 0.1, "low": 0.05, "high": 0.15},
                }
                for label, statistic in (("label_1", 0.12), ("label_2", 0.31))
            },
        },
    }
    for strength, dice in ((0.2, 0.85), (0.4, 0.84), (0.6, 0.82)):
        movement = [strength / 2 + 0.01 * case for case in range(8)]
        for kind in ("residual", "plain"):
            found[f"vary/{kind}-{strength}"] = {
                **who,
                "dice": scores(dice),
                "dice_shifted": scores(dice - 0.05),
                "movement": movement,
            }
    for name, dice in (("real-32", 0.82), ("real-144", 0.85), ("synthetic-500", 0.81)):
        for seed in (0, 1):
            found[f"utility/{name}-seed{seed}-steps100"] = {**who, "dice": scores(dice, seed)}
            found[f"utility/{name}-seed{seed}-steps200"] = {**who, "dice": scores(dice + 0.002, seed)}
    for seed in (0, 1, 2):
        found[f"few_labels/scratch-seed{seed}"] = {**who, "dice": scores(0.75)}
        found[f"few_labels/pretrained-seed{seed}"] = {**who, "dice": scores(0.77 + 0.01 * seed, seed)}
    return found


@pytest.fixture
def rows(report: ModuleType) -> dict[str, list[str]]:
    lines = report.table(cells(), "validation")
    parts = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(row) for row in parts} == {5}
    return {row[0]: row for row in parts}


def test_the_largest_strength_that_keeps_the_share_is_chosen(rows: dict[str, list[str]]) -> None:
    measured = rows["vary, largest strength"]
    assert measured[2].startswith("strength 0.4: share 0.988")
    assert "movement 0.78" in measured[2]
    assert measured[4] == "yes"
    assert rows["control: label shifted by one voxel"][2].startswith("0.941")


def test_targets_that_are_missed_are_said_to_be_missed(rows: dict[str, list[str]]) -> None:
    assert rows["latent numbers a voxel"][4] == "yes"
    assert rows["paint, share of the judge's Dice"][2].startswith("1.0588")
    assert rows["paint, share of the judge's Dice"][4] == "no"
    synthetic = rows["trained on 500 sampled pairs, Dice on real"]
    assert synthetic[2].startswith("0.8100")
    assert synthetic[3].startswith("32 real cases: 0.8200")
    assert synthetic[4] == "no"
    assert rows["volume of the anterior label, KS, 5 against 4"][4] == "yes"
    assert rows["volume of the posterior label, KS, 5 against 4"][4] == "no"
    assert rows["the same with 200 instead of 100 steps"][2:5:2] == ["+0.0020", "yes"]


def test_few_labels_are_compared_case_by_case(rows: dict[str, list[str]]) -> None:
    assert "+0.0200 [+0.02" in rows["2 labelled cases, seed 0: scratch, pretrained, difference"][2]
    assert rows["the same, mean of 3 seeds"][2].startswith("+0.0300")


def test_the_report_is_written_from_whatever_is_there(report: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "validation"
    report.write_report(folder)
    assert not folder.exists()
    for name, values in cells().items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"values": values}))
    report.write_report(folder)
    assert "Held-out cases: validation" in (folder / "table.md").read_text()
    assert {file.name for file in folder.glob("*.png")} == {"vary.png", "volumes.png"}
    assert not list(folder.glob(".tmp*"))
