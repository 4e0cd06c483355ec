"""Every command and every Python block of README.md runs as it stands, on real scans."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Hours of training become seconds, from weights that know hippocampi already: what seconds teach from nothing
# has no labels, and build refuses it. Installing is what .ci/run does, with the very same block.
SHORTENED = {
    "--budget 4h": "--budget 40s --init hippocampus-mr",
    "--per-case 8": "--per-case 1",
    "--steps 1000": "--steps 8",
    " benchmarks/": f" {ROOT}/benchmarks/",
}
INSTALL = re.compile(r"python -m pip install \S+ && ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    """All but those for nnU-Net, which tests/nnunet runs."""
    own = [block for block in blocks("bash") if "nnUNetv2" not in block]
    lines = [INSTALL.sub("", line) for block in own for line in block.splitlines() if line]
    return [line for line in lines if "pytest" not in line]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_commands_run_in_order(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "Task04_Hippocampus").symlink_to(data_folder / "Task04_Hippocampus")
    lines = shell_lines()
    assert len(lines) >= 4
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for line in lines:
        for long, short in SHORTENED.items():
            line = line.replace(long, short)
        subprocess.run(shlex.split(line), cwd=tmp_path, check=True, env=environment)
    for made in ("Dataset901_SyntheticHippocampus", "Dataset902_Mine"):
        assert (tmp_path / "nnUNet_raw" / made / "dataset.json").is_file()


@pytest.mark.parametrize("page", ["torchio", "monai"])
def test_first_block_of_a_page_runs(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_relative_links_lead_somewhere(page: Path) -> None:
    """Also to the headings that they name."""
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    for target in targets:
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target
