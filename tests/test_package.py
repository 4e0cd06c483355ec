"""The package as installed: import time, command, version, licences, wheel."""

import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import diffaug

ROOT = Path(__file__).parents[1]
HELP = "from diffaug.cli import app; app(['--help'])"


def run_python(code: str, *, cwd: Path) -> str:
    """Standard output of a fresh interpreter that runs ``code`` in ``cwd``."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("code", ["import diffaug", HELP], ids=["import", "help"])
def test_starts_in_less_than_a_second(code: str, tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run_python(code, cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("code", ["import diffaug", "import diffaug.cli"])
def test_import_leaves_heavy_packages_alone(code: str, tmp_path: Path) -> None:
    heavy = {"accelerate", "matplotlib", "monai", "nibabel", "nnunetv2", "numpy", "scipy", "torch", "torchio"}
    loaded = set(run_python(f"{code}; import sys; print(*sys.modules)", cwd=tmp_path).split())
    assert not heavy & loaded


def test_public_names_are_found_on_first_use() -> None:
    from diffaug.generators.generator import Generator
    from diffaug.zoo import load

    assert diffaug.Generator is Generator
    assert diffaug.load is load
    assert {"Generator", "load", "__version__"} <= set(dir(diffaug))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffaug.nothing


def test_version_is_the_same_everywhere() -> None:
    version = diffaug.__version__
    script = Path(sys.executable).with_name("diffaug")
    printed = subprocess.run([script, "--version"], check=True, capture_output=True, text=True).stdout
    assert printed == f"diffaug {version}\n"
    assert metadata.version("diffaug") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_metadata_carries_both_licences() -> None:
    package = metadata.distribution("diffaug")
    assert package.metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-4.0"
    assert package.metadata.get_all("License-File") == ["LICENSE", "LICENSES/CC-BY-SA-4.0.txt"]
    apache = package.read_text("licenses/LICENSE") or ""
    share_alike = package.read_text("licenses/LICENSES/CC-BY-SA-4.0.txt") or ""
    assert "Version 2.0, January 2004" in apache
    assert "END OF TERMS AND CONDITIONS" in apache
    assert "Attribution-ShareAlike 4.0 International" in share_alike
    assert "Section 8 -- Interpretation." in share_alike


def test_wheel_holds_code_weights_and_licences(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    bundled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffaug/zoo/bundled").rglob("*.*")}
    assert any(name.endswith("/card.json") for name in bundled)
    assert any(name.endswith(".safetensors") for name in bundled)
    assert bundled | {"diffaug/py.typed"} <= names
    licences = f"diffaug-{diffaug.__version__}.dist-info/licenses"
    assert {f"{licences}/LICENSE", f"{licences}/LICENSES/CC-BY-SA-4.0.txt"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]
