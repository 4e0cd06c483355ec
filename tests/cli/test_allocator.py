"""What the commands ask of the allocator, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a second 64 MB array, after the first one was freed.
FAULTS = """
import resource, sys
import numpy as np
from diffaug.cli.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**26, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fill()
print(kept, fill())
"""


def second_fill(mode: str, **environment: str) -> tuple[str, int]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode],
        env={**clean, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again() -> None:
    """64 MB are 16384 pages of 4 kB, or 32 of 2 MB, all of them faults where the memory is mapped anew."""
    _, before = second_fill("leave")
    kept, faults = second_fill("keep")
    assert kept == "True"
    assert faults < 0.2 * before


def test_settings_of_the_user_stay() -> None:
    assert second_fill("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
