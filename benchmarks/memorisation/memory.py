"""Memory and time of an audit of many large volumes: it must not hold them all.

python benchmarks/memorisation/memory.py --work CACHE

Volumes of 135 x 189 x 155 voxels of smooth noise; of each set a few differ and the others are links to them.
The encoder is trained for a few steps only, since its memory does not depend on the number of steps.
"""

import argparse
import json
import os
import shutil
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

from diffaug.audit.auditing import Options, Part, audit
from diffaug.files import atomic_write_json
from diffaug.progress import Progress

HERE = Path(__file__).parent
SHAPE = (135, 189, 155)
# Synthetic, training and held-out cases of each audit.
SIZES = ((100, 50, 20), (1000, 500, 100))
DISTINCT, STEPS = 20, 10


def main() -> None:
    """Audit sets of the two sizes; write the peaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    found = []
    for sizes in SIZES:
        shutil.rmtree(options.work, ignore_errors=True)
        roles = ("synthetic", "training", "held-out")
        parts = [
            Part.whole(linked(options.work / role, count, seed))
            for seed, (role, count) in enumerate(zip(roles, sizes, strict=True))
        ]
        with Peak() as peak:
            started = time.perf_counter()
            audit(*parts, options.work / "audit", options=Options(steps=STEPS), progress=Progress())
            seconds = time.perf_counter() - started
        cases = dict(zip(roles, sizes, strict=True))
        volumes = sum(sizes) * int(np.prod(SHAPE)) * 4 / 2**20
        found.append({"cases": cases, "volumes_mib": volumes, "peak_mib": peak.mib, "seconds": seconds})
        print(json.dumps(found[-1]))
    atomic_write_json(
        options.results / "memory.json", {"shape": SHAPE, "encoder_steps": STEPS, "audits": found}
    )


def linked(folder: Path, count: int, seed: int) -> Path:
    """A dataset of `count` cases, of which at most 20 differ."""
    rng = np.random.default_rng(seed)
    images = folder / "imagesTr"
    images.mkdir(parents=True)
    for number in range(count):
        file = images / f"{folder.name}_{number:04d}_0000.nii"
        if number < DISTINCT:
            coarse = rng.normal(size=[n // 8 for n in SHAPE])
            volume = zoom(coarse, np.divide(SHAPE, coarse.shape), order=1)
            nib.save(nib.Nifti1Image((200 * volume).astype(np.int16), np.eye(4)), file)
        else:
            os.link(images / f"{folder.name}_{number % DISTINCT:04d}_0000.nii", file)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0},
        "file_ending": ".nii",
        "numTraining": count,
    }
    atomic_write_json(folder / "dataset.json", {"name": folder.name, **description})
    return folder


class Peak:
    """Largest memory of this process while it is open, without the pages of mapped files, which the system
    takes back when it needs them (MiB)."""

    mib = 0.0

    def __enter__(self) -> "Peak":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.mib = max(self.mib, anonymous / 1024)


if __name__ == "__main__":
    main()
