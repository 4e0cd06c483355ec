"""The audit that a fit ends with."""

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffaug.audit.auditing import Options
from diffaug.audit.detector import read_detector
from diffaug.cli import app
from diffaug.datasets.reading import read_dataset
from diffaug.generators.generator import Generator
from diffaug.progress import Progress
from diffaug.training import closing
from diffaug.training.fit import fit_generator
from tests.training.conftest import blob_plan, write_blobs


@pytest.fixture(scope="module")
def many_blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty cases: nine to train, three to validate, eight to test."""
    folder = write_blobs(tmp_path_factory.mktemp("data") / "Blobs", 20)
    names = [f"blob_{n}" for n in range(20)]
    (folder / "splits.json").write_text(
        json.dumps({"train": names[:9], "validation": names[9:12], "test": names[12:]})
    )
    return folder


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    (tmp_path / "plan.json").write_text(blob_plan(steps=60).model_dump_json())
    return tmp_path / "plan.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit of 16 samples by an encoder of ten steps."""
    monkeypatch.setattr(closing, "SAMPLES", 16)
    monkeypatch.setattr(closing, "Options", partial(Options, steps=10))


@pytest.mark.usefixtures("quick")
def test_a_fit_ends_with_an_audit_on_its_card(
    many_blobs: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fit"
    generator = fit_generator(read_dataset(many_blobs), output, plan=plan_file, progress=Progress())
    assert isinstance(generator, Generator)
    audit = generator.card.audit
    assert audit is not None
    assert (audit.samples, audit.training, audit.held_out, audit.rejection) == (16, 9, 11, False)
    assert "Are there copies of training scans among the samples?" in [v.question for v in audit.verdicts]
    assert f"audit: {audit.answer}" in capsys.readouterr().err
    assert (output / "private" / "audit" / "report.html").is_file()
    assert not list(output.glob("*.html")), "a page with scans stays private"
    # What an audit leaves is what a build rejects by, and what the command says of the generator.
    assert read_detector(output / "private" / "copy_detector.safetensors").record.training == 9
    command = [
        "build",
        str(output),
        "--cases",
        "1",
        "--layout",
        "decathlon",
        "--reject-copies",
        "--device",
        "cpu",
    ]
    built = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "built")])
    assert "no audit" not in built.stderr
    assert ("failed its audit" in built.stderr) == (audit.answer == "fail")


@pytest.mark.usefixtures("quick")
def test_an_audit_that_was_left_out_can_be_made_later(
    many_blobs: Path, plan_file: Path, tmp_path: Path
) -> None:
    def fit(audit: bool) -> Generator:
        fitted = fit_generator(
            read_dataset(many_blobs),
            tmp_path / "fit",
            plan=plan_file,
            audit=audit,
            progress=Progress(quiet=True),
        )
        assert isinstance(fitted, Generator)
        return fitted

    assert fit(audit=False).card.audit is None
    assert fit(audit=False).card.audit is None
    assert fit(audit=True).card.audit is not None


def test_too_few_patients_make_no_audit_and_are_counted(
    blobs: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = fit_generator(read_dataset(blobs), tmp_path / "fit", plan=plan_file, progress=Progress())
    assert isinstance(generator, Generator)
    assert generator.card.audit is None
    assert "No audit: it needs 8 training patients, and there are 5" in capsys.readouterr().err
    command = ["build", str(tmp_path / "fit"), "--cases", "1", "--layout", "decathlon", "--device", "cpu"]
    built = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "built")])
    assert "has no audit on its card" in built.stderr


@pytest.mark.usefixtures("quick")
def test_scans_of_the_generator_that_a_fit_started_from_are_mentioned(
    many_blobs: Path, plan_file: Path, tmp_path: Path
) -> None:
    dataset, quiet = read_dataset(many_blobs), Progress(quiet=True)
    fit_generator(dataset, tmp_path / "first", plan=plan_file, audit=False, progress=quiet)
    fit_generator(dataset, tmp_path / "second", plan=plan_file, init=str(tmp_path / "first"), progress=quiet)
    report = json.loads((tmp_path / "second" / "private" / "audit" / "report.json").read_text())
    assert any("started from another one" in note for note in report["notes"])
