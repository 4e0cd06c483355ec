"""The generator benchmark: its report on made-up cells, its cases, and a whole run on a tiny generator."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffaug.generators.card import Card, CardGrid, Defaults, Training
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import DenoiserConfig
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
from diffaug.generators.medical_diffusion.model import MedicalDiffusion
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.medical_diffusion.vqgan import VQGANConfig
from diffaug.generators.verbs import VERBS

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "generator_quality"
PATIENTS = [f"P{number // 2}" for number in range(8)]


def load_module(name: str) -> ModuleType:
    """A module of the benchmark, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"generator_quality_{name}", BENCHMARK / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load_module("report")


@pytest.fixture(scope="module")
def cases_module() -> ModuleType:
    return load_module("cases")


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


def test_cases_are_drawn_by_patient(cases_module: ModuleType) -> None:
    names = tuple(f"case {number}" for number in range(8))
    images = torch.arange(8.0).view(8, 1, 1, 1, 1)
    cases = cases_module.Cases(names, tuple(PATIENTS), images, images.short())
    drawn = cases.draw(4, seed=3)
    assert len(set(drawn.patients)) == 2
    assert [names.index(name) for name in drawn.names] == drawn.images.flatten().tolist()
    assert drawn.names == cases.draw(4, seed=3).names
    assert len({cases.draw(2, seed=seed).names for seed in range(20)}) == 4
    assert len(set(cases.draw(3, seed=3, one_per_patient=True).patients)) == 3


def test_only_the_subsets_asked_for_are_read(
    cases_module: ModuleType, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    load_case = cases_module.load_case
    monkeypatch.setattr(cases_module, "load_case", lambda case: read.append(case.name) or load_case(case))
    cases = cases_module.read_cases(data_folder, ["validation"])
    split = json.loads((data_folder / "Task04_Hippocampus" / "splits.json").read_text())
    assert sorted(cases.names) == sorted(read) == sorted(split["validation"])
    assert cases.images.shape == cases.labels.shape == (20, 1, *cases_module.GRID.shape)
    assert cases.labels.unique().tolist() == [0, 1, 2]
    assert cases.network_units().abs().max() <= 1.5
    assert cases.standardised().mean((1, 2, 3, 4)).abs().max() < 1e-3


def tiny_generator_on_the_benchmarks_grid() -> Generator:
    """Untrained networks of a few channels."""
    networks = JointFlowNetworks(
        image_autoencoder=AutoencoderConfig(
            channels=1, latent_channels=2, downsampling=(4, 4, 4), widths=(8, 8), blocks=1
        ),
        label_autoencoder=AutoencoderConfig(
            channels=3, latent_channels=2, downsampling=(4, 4, 4), widths=(8, 8), blocks=1
        ),
        denoiser=DenoiserConfig(
            image_channels=2,
            label_channels=2,
            latent_shape=(10, 14, 10),
            convolution_width=8,
            width=16,
            depth=1,
            heads=2,
        ),
    )
    card = Card(
        name="tiny",
        description="Untrained, for a test.",
        networks=networks,
        grid=CardGrid(orientation=("R", "A", "S"), spacing=(1.0, 1.0, 1.0), shape=(40, 56, 40)),
        extent="object",
        channels=["MRI"],
        intensity=IntensityConvention(kind="percentile", typical=[(0.0, 1000.0)]),
        labels={0: "background", 1: "anterior", 2: "posterior"},
        verbs=list(VERBS),
        defaults=Defaults(steps=1),
        training=Training(dataset="none", cases={}, patients=None, autoencoder_steps=0, denoiser_steps=0),
        licence="CC0-1.0",
        files={},
    )
    return Generator(card, JointFlow(networks))


@pytest.mark.slow
def test_a_run_measures_what_is_missing_and_measures_other_weights_again(
    data_folder: Path, tmp_path: Path
) -> None:
    generator = tiny_generator_on_the_benchmarks_grid()
    generator.save(tmp_path / "tiny")

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, str(BENCHMARK / "run.py"), "--generator", str(tmp_path / "tiny")]
        command += ["--data", str(data_folder), "--work", str(tmp_path / "work")]
        command += ["--results", str(tmp_path / "results"), "--steps", "1", "--pairs", "20", "--seeds", "1"]
        paths = os.pathsep.join([str(BENCHMARK.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    figures = (
        "--only",
        "latent",
        "reconstruction",
        "paint",
        "vary/originals",
        "vary/residual-0.5",
        "volumes",
    )
    names = [*figures[1:]]
    assert [line for line in run("--list", *figures) if line.endswith(": missing")] == [
        f"{name}: missing" for name in names
    ]
    run(*figures)
    assert {line for line in run(*figures) if ":" in line} == {f"{name}: there" for name in names}
    folder = tmp_path / "results" / "validation"
    values = json.loads((folder / "vary" / "residual-0.5.json").read_text())["values"]
    assert len(values["dice"]) == len(values["movement"]) == len(values["cases"]) == 20
    assert "latent numbers a voxel" in (folder / "table.md").read_text()

    with torch.no_grad():
        generator.model.denoiser.get_parameter(
            next(iter(dict(generator.model.denoiser.named_parameters())))
        ).add_(1)
    generator.save(tmp_path / "tiny")
    states = dict(line.split(": ") for line in run("--list", *figures) if ": " in line)
    assert states == {name: "there" if name == "vary/originals" else "missing" for name in names}


def tiny_medical_diffusion() -> Generator:
    """Untrained networks of a few channels, on the benchmark's grid."""
    networks = MedicalDiffusionNetworks(
        autoencoder=VQGANConfig(hidden=4, groups=4, downsampling=(4, 4, 4), latent_channels=3, codes=16),
        denoiser=UNetConfig(channels=3, out_channels=3, dim=8, dim_mults=(1, 2), heads=2, head_dim=4),
        shape=(40, 56, 40),
        steps=300,
        latent_range=(-2.0, 2.0),
    )
    card = tiny_generator_on_the_benchmarks_grid().card.model_dump() | {
        "architecture": "medical-diffusion",
        "networks": networks,
        "labels": {},
        "verbs": sorted(networks.verbs),
        "defaults": {"sampler": "dpm-solver++", "steps": 1},
        "training": {
            "dataset": "none",
            "cases": {},
            "patients": None,
            "autoencoder_steps": 0,
            "denoiser_steps": 0,
            "seconds": 60.0,
        },
    }
    return Generator(Card.model_validate(card), MedicalDiffusion(networks))


@pytest.mark.slow
def test_a_generator_without_labels_is_measured_too(data_folder: Path, tmp_path: Path) -> None:
    tiny_medical_diffusion().save(tmp_path / "tiny")
    common = ["--data", str(data_folder), "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    common += ["--steps", "1", "--seeds", "1"]
    paths = os.pathsep.join([str(BENCHMARK.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}

    def run(script: Path, *arguments: str) -> str:
        command = [sys.executable, str(script), *common, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    quality = ["--generator", str(tmp_path / "tiny"), "--pairs", "20", "--sampler-steps", "2"]
    figures = ("latent", "reconstruction", "vary/originals", "vary/plain-0.5", "utility/synthetic", "volumes")
    said = run(BENCHMARK / "run.py", *quality, "--only", *figures)
    assert "utility/synthetic-20-seed0-steps1: measured" in said
    listed = run(BENCHMARK / "run.py", *quality, "--list")
    assert "paint" not in listed
    assert "few_labels" not in listed
    table = (tmp_path / "validation" / "table.md").read_text()
    assert "trained on 20 samples that the judge labelled" in table
    assert "round trip" not in table

    dice = BENCHMARK.parent / "sampling_speed" / "dice.py"
    given = ["--medical-diffusion", str(tmp_path / "tiny"), "--samples", "20"]
    points = ["--results", str(tmp_path / "dice"), "--only", "medical-diffusion-dpm"]
    plot = tmp_path / "dice" / "validation" / "dice.png"
    said = run(dice, *given, *points, "--part", "dice")
    assert "dice of medical-diffusion-dpm-solverpp-20: measured" in said
    assert not plot.exists()
    said = run(dice, *given, *points)
    assert "dice of medical-diffusion-dpm-solverpp-20: there" in said
    assert "seconds of medical-diffusion-dpm-solverpp-20: measured" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "need --medical-diffusion" in run(dice, "--samples", "20", *points)
