"""The speed benchmark: one small measurement, a whole run of few steps, sizes of the networks, the ratios."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "sampling_speed"
MODULES = ("competitors", "measure", "report")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules: a folder of scripts that import each other by name, and no package."""
    loaded = {}
    threads = torch.get_num_threads()
    # Threads that spin beside other test workers cost more than they save.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            spec = importlib.util.spec_from_file_location(name, BENCHMARK / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            loaded[name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, loaded[name])
            spec.loader.exec_module(loaded[name])
        yield loaded
    torch.set_num_threads(threads)


def competitor(modules: dict[str, ModuleType], name: str) -> Any:
    """The settings of one row."""
    return next(each for each in modules["competitors"].COMPETITORS if each.name == name)


def cell(seconds: list[float], **changes: Any) -> dict[str, Any]:
    """A cell of some times, the middle one their median."""
    identity = {
        "system": "seed",
        "processor": "P",
        "cores": 2,
        "threads": 2,
        "malloc": {},
        "versions": {"torch": "1"},
        "shape": [8, 8, 8],
        "bfloat16": False,
        "plain": True,
        "downsampling": 2,
        "guidance": None,
        "batch": 1,
        "draws": 3,
    }
    low, middle, high = seconds
    values = {
        "seconds": {"median": middle, "min": low, "max": high, "all": seconds},
        "memory_mib": {"peak": 900.0, "after_imports": 500.0},
        "network_calls": 20,
        "parameters": {"denoiser": 10, "autoencoders": 1},
        "sampler": "ddim",
        "steps": 20,
        "guidance": 1.0,
        "precision": "float32",
        "other_processes_cores": 0.0,
    }
    return {
        "identity": identity | changes,
        "values": values,
        "load_average": 0.1,
        "measured": "2026-01-01T00:00:00",
    }


def test_the_seed_is_measured_on_a_small_grid(modules: dict[str, ModuleType]) -> None:
    recipe = replace(competitor(modules, "seed-300"), steps=3, draws=2)
    found = modules["measure"].measure(recipe, (8, 12, 8))
    assert found["network_calls"] == 3
    assert found["parameters"] == {"denoiser": 9_981_512, "autoencoders": 266_825}
    assert len(found["seconds"]["all"]) == 2
    assert 0 < found["seconds"]["min"] <= found["seconds"]["median"] <= found["seconds"]["max"]
    assert found["memory_mib"]["peak"] >= found["memory_mib"]["after_imports"] > 0
    assert found["precision"] == "float32"


def test_monai_decodes_each_volume_of_a_batch(modules: dict[str, ModuleType]) -> None:
    pytest.importorskip("monai")
    pair = replace(competitor(modules, "monai-20-batch2"), steps=2)
    contestant = modules["competitors"].make(pair, (8, 8, 8))
    assert contestant.draw(0).shape == (2, 1, 8, 8, 8)


def test_monai_networks_have_the_sizes_of_the_seed(modules: dict[str, ModuleType]) -> None:
    pytest.importorskip("monai")
    with torch.device("meta"):
        autoencoder, denoiser = modules["competitors"].monai_networks()
        latent = autoencoder.encode(torch.empty(1, 1, 40, 56, 40))[0]
    assert latent.shape == (1, 8, 20, 28, 20)
    count = modules["measure"].parameter_count
    assert count(denoiser) == 10_348_552 == pytest.approx(9_981_512, rel=0.05)
    assert count(autoencoder) == 293_281 == pytest.approx(266_825, rel=0.10)


def test_guidance_takes_one_call_a_step(modules: dict[str, ModuleType]) -> None:
    """Of a batch of two."""
    measure, flagship = modules["measure"].measure, competitor(modules, "flagship-20")
    guided, unguided = (
        measure(replace(flagship, steps=3, draws=1, guidance=guidance), (40, 56, 40))
        for guidance in (1.5, None)
    )
    assert (guided["guidance"], guided["network_calls"]) == (1.5, 3)
    assert (unguided["guidance"], unguided["network_calls"]) == (1.0, 3)


def test_rounds_join_their_times(modules: dict[str, ModuleType]) -> None:
    first, second = (cell([0.0] * 3)["values"] for _ in range(2))
    first |= {"seconds": {"all": [3.0, 1.0]}, "other_processes_cores": 0.5}
    second |= {"seconds": {"all": [2.0, 9.0, 4.0]}}
    values = modules["measure"].joined(first, second)
    assert values["seconds"] == {"median": 3.0, "min": 1.0, "max": 9.0, "all": [3.0, 1.0, 2.0, 9.0, 4.0]}
    assert values["other_processes_cores"] == 0.5


def test_a_run_measures_reports_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("monai", reason="the cells name its version")
    command = [sys.executable, BENCHMARK / "run.py", "--threads=1", f"--output={tmp_path}", "--smoke"]
    name = "flagship-20-unguided"
    first, second = (
        subprocess.run([*command, "--only", name], check=True, capture_output=True, text=True)
        for _ in range(2)
    )
    assert f"time/{name}: there" not in first.stderr
    assert f"time/{name}: there" in second.stderr
    assert first.stdout == second.stdout
    time, memory = (json.loads((tmp_path / kind / f"{name}.json").read_text()) for kind in ("time", "memory"))
    assert time["identity"]["threads"] == 1
    # What speeds the timed process up would inflate the other's memory.
    assert time["identity"]["malloc"]
    assert not memory["identity"]["malloc"]
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 2
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_ratios_are_of_medians_and_between_extremes(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    cells = {"seed-20": cell([10.0, 12.0, 20.0]), "flagship-20": cell([0.5, 1.0, 2.0], system="flagship")}
    found = report.ratio(cells, "seed-20", "flagship-20", 10.0)
    assert (found.value, found.low, found.high) == (12.0, 5.0, 40.0)
    assert found.verdict == "met"
    assert replace(found, target=12.1).verdict == "not met"
    assert replace(found, target=None).verdict == "–"


def test_other_surroundings_are_not_compared(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    cells = {"seed-20": cell([1.0, 2.0, 3.0]), "flagship-20": cell([1.0, 1.0, 1.0], threads=4)}
    assert report.ratio(cells, "seed-20", "flagship-20", 10.0) is None
    assert report.ratio(cells, "seed-20", "monai-20", 5.0) is None
    assert "Not all cells" in report.provenance(cells)


def test_tables_say_whether_targets_are_met_and_the_machine_was_idle(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    cells = {
        "seed-300": cell([90.0, 100.0, 110.0]),
        "seed-20": cell([11.0, 12.0, 13.0]),
        "monai-20": cell([2.0, 3.0, 4.0], system="monai"),
        "flagship-20": cell([1.0, 1.0, 1.0], system="flagship"),
    }
    text = "\n".join(report.table(cells))
    assert "| 12.0 (11.0 to 13.0) | at least 10 | met |" in text
    assert "| 3.00 (2.00 to 4.00) | at least 5 | not met |" in text
    assert "not idle" not in text
    cells["monai-20"]["values"]["other_processes_cores"] = 0.5
    assert "not idle" in report.table(cells)[0]


def test_the_readme_shows_the_committed_cells(modules: dict[str, ModuleType]) -> None:
    begin, end = modules["report"].MARKS
    block = (BENCHMARK / "README.md").read_text().split(begin)[1].split(end)[0].strip()
    assert block == (BENCHMARK / "results" / "table.md").read_text().strip()


def test_the_readme_keeps_what_surrounds_the_table(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    report = modules["report"]
    begin, end = report.MARKS
    readme, table = tmp_path / "README.md", tmp_path / "table.md"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    table.write_text("new\n")
    for _ in range(2):
        report.fill_readme(readme, table)
    assert readme.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert all(mark in (BENCHMARK / "README.md").read_text() for mark in report.MARKS)
