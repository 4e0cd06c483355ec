"""The ``diffaug`` command: help, arguments, and how errors are shown."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from diffaug.cli import app
from diffaug.cli.fit import parse_duration
from diffaug.cli.options import parse_pair
from diffaug.cli.wording import with_options


@pytest.mark.parametrize("command", ["fit", "build"])
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--output" in result.output


@pytest.mark.parametrize(
    ("text", "seconds"), [("4h", 14400), ("90m", 5400), ("1d12h", 129600), ("1.5h", 5400), ("45s", 45)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "4 h", "-4h", "0h", "4h later", "nan"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a duration"):
        parse_duration(text)


def test_pairs_of_label_ids() -> None:
    assert parse_pair("17=1") == (17, 1)


@pytest.mark.parametrize("text", ["", "17", "17=", "=1", "17=1=2", "a=1", "-1=1"])
def test_anything_else_is_no_pair(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a pair of label ids"):
        parse_pair(text)


def test_bad_input_ends_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["build", "no-such-generator", "--cases", "1", "--output", str(tmp_path / "new")]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("diffaug: ")
    assert "no-such-generator" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("leave allow_label_drift out", "leave --allow-label-drift out"),
        ("pass residual=False", "pass --plain"),
        ("leave out source and label_mapping", "leave out --source and --label-mapping"),
        ("leave guidance=3.0 out", "leave --guidance out"),
        ("give it as source", "give it as --source"),
    ],
)
def test_errors_name_options(message: str, said: str) -> None:
    assert with_options(message) == said
