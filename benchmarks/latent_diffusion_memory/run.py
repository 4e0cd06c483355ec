"""How much memory and time do published latent-diffusion networks take on a CPU? Are the estimates true?

python benchmarks/latent_diffusion_memory/run.py

Networks of the published sizes with random weights, which take what the real ones take. Each measurement is
a process of its own: its peak beyond what it held before, and its seconds. At half the side MONAI's own
`decode` is measured, too.
"""

import argparse
import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from diffaug.files import atomic_write_json
from diffaug.generators.latent_diffusion import slabs
from diffaug.generators.latent_diffusion.model import LatentDiffusion
from diffaug.generators.latent_diffusion.networks import LatentDiffusionNetworks
from diffaug.generators.model import Sampling
from diffaug.generators.seeds import CaseNoise
from diffaug.progress import Progress
from diffaug.zoo.monai.templates import TEMPLATES

HERE = Path(__file__).parent
DECODING = ("decode", "half, in slabs", "half, by MONAI")
# NV-Generate's autoencoder is MAISI's; its networks for MR are those for CT.
MEASURED = {
    "brats-flair-ldm": (*DECODING, "denoise"),
    "brain-t1-ldm": (*DECODING, "denoise"),
    "maisi-ct": (*DECODING, "denoise", "paint"),
    "nv-generate-ct": ("denoise", "paint"),
}


def main() -> None:
    """Measure all, or one thing in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "WORK"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    progress, found = Progress(), []
    pieces = [(name, work) for name, several in MEASURED.items() for work in several]
    with progress.task("measuring", total=len(pieces)) as task:
        for name, work in pieces:
            made = subprocess.run(
                [sys.executable, __file__, "--one", name, work], check=True, capture_output=True, text=True
            )
            found.append(json.loads(made.stdout))
            progress.note(str(found[-1]))
            task.advance()
    cores = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    atomic_write_json(options.results / "memory.json", {**cores, "measured": found})


@torch.inference_mode()
def measure(name: str, work: str) -> dict[str, Any]:
    """One piece of work: gibibytes beyond what the process held, and what was estimated."""
    template = TEMPLATES[name]
    control = template.control if work == "paint" else None
    networks = LatentDiffusionNetworks(
        autoencoder=template.autoencoder,
        denoiser=template.denoiser,
        control=control,
        process=template.process,
        shape=template.shape,
        spacing=template.spacing,
        scale_factor=1.0,
        conditions=template.conditions,
        label_ids=(0, 1) if control else (),
    )
    model = LatentDiffusion(networks)
    channels, *sides = model.image_latent
    if work.startswith("half"):
        sides = [n // 2 for n in sides]
    latent = torch.randn(1, channels, *sides)
    estimate = networks.autoencoder.working_bytes(prod(sides) * networks.autoencoder.factor**3)
    told = {key: parameter.number(key, parameter.default) for key, parameter in template.parameters.items()}
    sampling = Sampling(networks.samplers[0], steps=1, parameters=told)
    held = reset_peak()
    began = time.monotonic()
    if work == "half, by MONAI":
        model.autoencoder.decode(latent)
        estimate = 0
    elif work in ("decode", "half, in slabs"):
        slabs.decode(model.autoencoder, latent)
    else:
        estimate = networks.denoiser.working_bytes(prod(sides))
        if control:
            estimate += control.working_bytes(prod(networks.shape))
            label = torch.zeros(1, 1, *networks.shape, dtype=torch.long)
            model.paint(model.encode_label(label), CaseNoise([0]), sampling)
        else:
            model.sample(CaseNoise([0]), sampling)
    seconds = time.monotonic() - began
    return {
        "generator": name,
        "work": work,
        "latent": [channels, *sides],
        "gibibytes": round((peak() - held) / 2**30, 2),
        "estimated": round(estimate / 2**30, 2) or None,
        "seconds": round(seconds, 1),
    }


def reset_peak() -> int:
    """Forget the process's peak; returns the bytes that it holds (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that the process held since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    main()
