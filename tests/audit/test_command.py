"""``diffaug audit``: what it prints, which cases it takes, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import diffaug.audit.auditing
from diffaug.audit.auditing import Part
from diffaug.audit.record import Report
from diffaug.cli import app
from tests.audit.conftest import Audited
from tests.audit.world import World


def command(synthetic: Path, train: Path, output: Path, *more: object) -> Result:
    arguments = ["audit", synthetic, "--train", train, "--output", output, "--device", "cpu", *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def parts(leaky: Audited, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Part]]:
    """The sets of each audit that a command starts; the report is always the same."""
    seen: list[Sequence[Part]] = []

    def audit(*given: object, **options: object) -> Report:
        seen.append([part for part in given if isinstance(part, Part)])
        return leaky.report

    monkeypatch.setattr(diffaug.audit.auditing, "audit", audit)
    return seen


def names(found: Part) -> set[str]:
    return {case.name for case in found.cases}


def without_split(world: World, folder: Path, prefix: str, name: str = "Copy") -> Path:
    """A copy of the real cases whose names start so, without a split."""
    root = folder / name
    shutil.copytree(world.real, root)
    (root / "splits.json").unlink()
    description = json.loads((root / "dataset.json").read_text())
    kept = [entry for entry in description["training"] if f"/{prefix}" in entry["image"]]
    (root / "dataset.json").write_text(json.dumps(description | {"training": kept}))
    return root


# -------- what is printed


def test_the_page_is_printed_and_verdicts_go_to_stderr(
    world: World, leaky: Audited, cache: Path, short_audits: None, tmp_path: Path
) -> None:
    result = command(world.leaky, world.real, tmp_path / "out", "--cache", cache)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out' / 'report.html'}\n"
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "report.html").is_file()
    assert report.copies.clear_copies == 4
    assert report.training == leaky.report.training
    assert report.held_out == leaky.report.held_out
    for verdict in report.verdicts:
        assert f"{verdict.answer:7} {verdict.question}" in result.stderr


def test_json_is_the_whole_report(
    world: World, leaky: Audited, parts: list[Sequence[Part]], tmp_path: Path
) -> None:
    result = command(world.leaky, world.real, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert Report.model_validate_json(result.stdout) == leaky.report
    assert "fail" in result.stderr


def test_help_names_the_arguments() -> None:
    result = CliRunner().invoke(app, ["audit", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in ("SYNTHETIC", "--train", "--holdout", "--holdout-subset", "--json", "--utility"):
        assert option in result.output


# -------- which cases are taken


@pytest.mark.parametrize(
    ("subsets", "taken"),
    [
        ([], ("validation", "test")),
        (["validation"], ("validation",)),
        (["test"], ("test",)),
        (["test", "validation"], ("validation", "test")),
    ],
)
def test_a_split_says_what_trained_and_what_was_held_out(
    world: World, parts: list[Sequence[Part]], tmp_path: Path, subsets: list[str], taken: tuple[str, ...]
) -> None:
    options = [word for subset in subsets for word in ("--holdout-subset", subset)]
    result = command(world.leaky, world.real, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    split = json.loads((world.real / "splits.json").read_text())
    ((made, training, held_out),) = parts
    assert len(made.cases) == 24
    assert names(training) == set(split["train"])
    assert names(held_out) == {name for subset in taken for name in split[subset]}
    assert {case.patient for case in training.cases} == {f"train patient {n}" for n in range(20)}


def test_another_dataset_is_held_out(world: World, parts: list[Sequence[Part]], tmp_path: Path) -> None:
    training = without_split(world, tmp_path, "train", "Training")
    others = without_split(world, tmp_path, "test", "Others")
    result = command(world.leaky, training, tmp_path / "out", "--holdout", others)
    assert result.exit_code == 0, result.output
    _, first, second = parts[0]
    assert {name.split("_")[0] for name in names(first)} == {"train"}
    assert len(first.cases) == 30
    assert {name.split("_")[0] for name in names(second)} == {"test"}
    assert len(second.cases) == 12
    # With a split, what is held out there.
    result = command(world.leaky, training, tmp_path / "out", "--holdout", world.real)
    assert result.exit_code == 0, result.output
    assert {name.split("_")[0] for name in names(parts[1][2])} == {"validation", "test"}


def test_a_table_of_patients_may_be_given(world: World, parts: list[Sequence[Part]], tmp_path: Path) -> None:
    table = tmp_path / "who.csv"
    lines = (world.real / "patients.csv").read_text().replace("train patient", "P").splitlines()
    table.write_text("\n".join(lines))
    result = command(world.leaky, world.real, tmp_path / "out", "--patients", table)
    assert result.exit_code == 0, result.output
    assert {case.patient for case in parts[0][1].cases} == {f"P {n}" for n in range(20)}
    assert not parts[0][0].dataset.patients_given


# -------- what is refused


def test_a_training_dataset_without_split_needs_a_held_out_one(
    world: World, parts: list[Sequence[Part]], tmp_path: Path
) -> None:
    result = command(world.leaky, without_split(world, tmp_path, "train"), tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "has no split that says which cases were held out: give --split" in result.stderr
    assert not (tmp_path / "out").exists()
    assert parts == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--holdout-subset", "train"], "validation or test"),
        (["--network", "resnet10"], "--network and --network-weights go together"),
        (["--holdout", "no such folder"], "no such folder"),
        (["--features", "no.csv"], "no.csv"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(
    world: World, parts: list[Sequence[Part]], tmp_path: Path, options: list[str], message: str
) -> None:
    result = command(world.leaky, world.real, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert parts == []


def test_a_subset_of_a_dataset_without_split_is_refused(
    world: World, parts: list[Sequence[Part]], tmp_path: Path
) -> None:
    others = without_split(world, tmp_path, "test")
    result = command(
        world.leaky, world.real, tmp_path / "out", "--holdout", others, "--holdout-subset", "test"
    )
    assert result.exit_code == 1
    assert "has no split: leave --holdout-subset out" in result.stderr


def test_one_dataset_in_both_places_is_refused_without_traceback(world: World, tmp_path: Path) -> None:
    folder = without_split(world, tmp_path, "t")
    result = command(world.honest, folder, tmp_path / "out", "--holdout", folder)
    assert result.exit_code == 1
    assert "patients are among the training and the held-out cases" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_dataset_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = command(tmp_path / "empty", world.real, tmp_path / "out")
    assert result.exit_code == 1
    assert str(tmp_path / "empty") in result.stderr
    assert not (tmp_path / "out").exists()
