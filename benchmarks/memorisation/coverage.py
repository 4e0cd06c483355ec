"""How often does the balance's interval hold the truth? Simulated audits with known shares of copies.

python benchmarks/memorisation/coverage.py

Patients are points in eight dimensions with one to three scans each; samples are other points of that
population, or scans of the training side with a little noise. The truth is the mean share over many audits.
"""

import argparse
from pathlib import Path

import numpy as np

from diffaug.evaluation.balance import balance
from diffaug.evaluation.statistics import Interval
from diffaug.files import atomic_write_json
from diffaug.progress import Progress

HERE = Path(__file__).parent
DIMENSIONS, SAMPLES = 8, 200
TRAINING, HELD_OUT = 92, 39
COPIES = (0.0, 0.3, 0.8)
# Spread of a patient's scans and of a copy, where patients have 1.
OF_A_PATIENT, OF_A_COPY = 0.3, 0.2


def main() -> None:
    """Simulate, and write how often the interval held the truth, and how wide it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--audits", type=int, default=120, help="of each share of copies")
    parser.add_argument("--exchanges", type=int, default=200, help="of patients, for each interval")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    progress = Progress()
    found = []
    for copies in COPIES:
        shares = []
        with progress.task(f"{copies:.0%} copies", total=options.audits) as task:
            for seed in range(options.audits):
                shares.append(simulate(copies, seed, options.exchanges))
                task.advance()
        truth = float(np.mean([share.value for share in shares]))
        held = float(np.mean([share.low <= truth <= share.high for share in shares]))
        width = float(np.mean([share.high - share.low for share in shares]))
        found.append({"copies": copies, "share": truth, "coverage": held, "width": width})
        progress.note(str(found[-1]))
    settings = {"audits": options.audits, "exchanges": options.exchanges}
    atomic_write_json(options.results / "coverage.json", {**settings, "found": found})


def simulate(copies: float, seed: int, exchanges: int) -> Interval:
    """The share of one audit, with its interval."""
    rng = np.random.default_rng(seed)
    training, held_out = scans(TRAINING, rng), scans(HELD_OUT, rng)
    originals = training[0][rng.integers(len(training[0]), size=SAMPLES)]
    copied = originals + OF_A_COPY * rng.normal(size=originals.shape)
    samples = np.where(rng.random(SAMPLES)[:, None] < copies, copied, scans(SAMPLES, rng)[0][:SAMPLES])
    to_training, to_held_out = (
        np.linalg.norm(samples[:, None] - points[None], axis=2) for points, _ in (training, held_out)
    )
    patients = [f"t{p}" for p in training[1]], [f"h{p}" for p in held_out[1]]
    return balance(to_training, to_held_out, *patients, exchanges=exchanges, seed=seed).share


def scans(patients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points of all scans, and the patient of each."""
    own = np.repeat(np.arange(patients), rng.integers(1, 4, size=patients))
    centres = rng.normal(size=(patients, DIMENSIONS))
    return centres[own] + OF_A_PATIENT * rng.normal(size=(len(own), DIMENSIONS)), own


if __name__ == "__main__":
    main()
