"""The memorisation benchmark: its table and curve, and what it plants."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memorisation"


def module(name: str) -> ModuleType:
    """A script of the benchmark; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"memorisation_{name}", BENCHMARK / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def write_audits(folder: Path, name: str, steps: int) -> None:
    generator = {"name": name, "architecture": "joint-flow", "steps": steps}
    memorisation = {
        "balance": figure(steps / 10000),
        "membership_auc": figure(0.5),
        "memorised_share": 0.1,
        "memorised_null": 0.05,
    }
    report: dict[str, Any] = {
        "synthetic": {"cases": 200},
        "copies": {"copies": 7, "clear_copies": 1},
        "spaces": [{"name": space, "memorisation": memorisation} for space in ("encoder", "intensities")],
        "verdicts": [{"about": "privacy", "answer": "fail"}, {"about": "use", "answer": "pass"}],
    }
    for kind in ("plain", "rejected"):
        content = {"generator": generator, "kind": kind, "report": report}
        (folder / f"{name}-{kind}.json").write_text(json.dumps(content))
    for cases, value in ((200, 0.8), (500, 0.9)):
        dice = {"generator": generator, "cases": cases, "steps": 6000, "dice": figure(value)}
        (folder / f"{name}-dice-{cases}-6000.json").write_text(json.dumps(dice))


def test_the_table_has_a_row_for_each_audit_and_the_training_first(tmp_path: Path) -> None:
    report = module("report")
    own = report.NAME
    for name, steps in ((f"{own}-step-2000", 2000), ("zoo", 2000), (own, 3000), (f"{own}-step-500", 500)):
        write_audits(tmp_path, name, steps)
    # Not yet measured with rejection.
    write_audits(tmp_path, "half", 9)
    (tmp_path / "half-rejected.json").unlink()
    results = report.read_results(tmp_path)
    names = [result["generator"]["name"] for result in results]
    assert names == [f"{own}-step-500", f"{own}-step-2000", own, "zoo"]
    lines = report.table(results)
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(f"| {own}-step-500 | 500 | as sampled | 1 | 7 of 200 | 0.05 [-0.05, 0.15] |")
    assert lines[3].endswith("| fail | 0.800 [0.700, 0.900] (200; 6000); 0.900 [0.800, 1.000] (500; 6000) |")
    levels = [{"level": level, "excess": 0.1} for level in (0.2, 0.6)]
    gaps = [{"generator": {"name": own, "steps": steps}, "levels": levels} for steps in (500, 3000)]
    report.plot_curve(results, gaps, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_planted_differs_from_its_original_as_its_name_says() -> None:
    planted = module("planted")
    rng = np.random.default_rng(0)
    image = rng.normal(100, 20, (20, 24, 22)).astype(np.float32)
    label = (image > 120).astype(np.uint8)
    other = rng.normal(100, 20, (18, 26, 22)).astype(np.float32)
    assert sum(count for _, count in planted.KINDS) == 20
    for alter in [kind for kind, _ in planted.KINDS] + list(planted.ALTERATIONS.values()):
        changed, changed_label = alter(image, label, other, np.random.default_rng(1))
        assert changed.shape == changed_label.shape == image.shape
        assert set(np.unique(changed_label)) <= {0, 1}
        assert np.array_equal(changed, image) == (alter is planted.exact)
    moved = planted.ALTERATIONS["shifted by 2 voxels"](image, label, other, rng)[0]
    assert np.array_equal(moved[:-2, :-2, :-2], image[2:, 2:, 2:])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(planted.turned(8)(image, label, other, rng)[0], image, atol=1)
