"""Time one competitor in this process, whose peak memory is then its own.

`run.py` starts it, and imports nothing large: on Linux a process begins with the peak of the one that
starts it.
"""

import argparse
import os
import platform
import resource
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import psutil
import torch
from competitors import COMPETITORS, FLAGSHIP, Competitor, Contestant, make
from torch import nn

from diffaug.files import atomic_write_json, read_json
from diffaug.generators.card import read_card
from diffaug.generators.generator import Generator  # noqa: F401 (an import that the baseline counts)
from diffaug.generators.hardware import has_bfloat16
from diffaug.zoo import folder_of


def main() -> None:
    """Measure the competitor that the command line names and write its cell, unless that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[competitor.name for competitor in COMPETITORS])
    parser.add_argument("file", type=Path, help="JSON file of the cell")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--most-steps", type=int, help="take no more steps than these")
    parser.add_argument("--draws", type=int, help="instead of the competitor's own number")
    parser.add_argument("--again", action="store_true", help="measure although the cell is there")
    parser.add_argument("--round", type=int, default=1, help="add to a cell that has fewer rounds than this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    competitor = next(each for each in COMPETITORS if each.name == options.name)
    card = read_card(folder_of(FLAGSHIP) / "card.json")
    if options.most_steps is not None:
        steps = min(options.most_steps, competitor.steps or card.defaults.steps)
        competitor = replace(competitor, steps=steps)
    if options.draws is not None:
        competitor = replace(competitor, draws=options.draws)
    if competitor.bfloat16 and not has_bfloat16():
        say(f"{competitor.name}: left out, since this processor has no bfloat16")
        return
    identity = {**asdict(competitor), **machine(), "shape": list(card.grid.shape)}
    if competitor.system == "flagship":
        identity |= {"weights": card.files, "defaults": card.defaults.model_dump(mode="json")}
    cell = f"{options.file.parent.name}/{competitor.name}"
    before = read_json(options.file) if options.file.exists() and not options.again else None
    if before is not None and before["identity"] != identity:
        before = None
    if before is not None and before["rounds"] >= options.round:
        say(f"{cell}: there")
        return
    began, load_average = datetime.now(UTC), os.getloadavg()[0]
    values = measure(competitor, card.grid.shape)
    if before is not None:
        values = joined(before["values"], values)
        load_average = max(load_average, before["load_average"])
    content = {
        "identity": identity,
        "rounds": 1 if before is None else before["rounds"] + 1,
        "values": values,
        "load_average": load_average,
        "measured": began.isoformat(timespec="seconds"),
    }
    atomic_write_json(options.file, content)
    say(f"{cell}: {values['seconds']['median']:.2f} s a volume, {values['memory_mib']['peak']:.0f} MiB")


def measure(competitor: Competitor, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds a volume of each draw after one that warms up, memory (MiB), denoiser calls, and sizes."""
    if competitor.system == "monai":
        import monai.inferers
        import monai.networks.schedulers  # noqa: F401 (imports that the baseline counts)
    baseline = peak_memory()
    torch.manual_seed(0)
    contestant = make(competitor, shape)
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    contestant.denoiser.register_forward_hook(count)
    busy, own, began = busy_seconds(), process_time(), perf_counter()
    # Seed 0 warms up.
    _, *seconds = (timed(contestant, seed, competitor) for seed in range(competitor.draws + 1))
    others = (busy_seconds() - busy - (process_time() - own)) / (perf_counter() - began)
    return {
        "seconds": summary(seconds),
        "memory_mib": {"peak": peak_memory(), "after_imports": baseline},
        "network_calls": calls[0] // (competitor.draws + 1),
        "parameters": {
            "denoiser": parameter_count(contestant.denoiser),
            "autoencoders": sum(map(parameter_count, contestant.autoencoders)),
        },
        "sampler": contestant.sampler,
        "steps": contestant.steps,
        "guidance": contestant.guidance,
        "precision": "bfloat16" if in_bfloat16(competitor) else "float32",
        "other_processes_cores": max(0.0, others),
    }


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, extremes and every single time."""
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "all": seconds}


def joined(before: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a cell with one more round."""
    seconds = [*before["seconds"]["all"], *values["seconds"]["all"]]
    others = max(before["other_processes_cores"], values["other_processes_cores"])
    return values | {"seconds": summary(seconds), "other_processes_cores": others}


def timed(contestant: Contestant, seed: int, competitor: Competitor) -> float:
    """Seconds a volume of one draw."""
    start = perf_counter()
    volumes = contestant.draw(seed)
    seconds = perf_counter() - start
    # Arithmetic on NaN or infinities may take another time.
    if not bool(torch.isfinite(volumes).all()):
        raise SystemExit(f"{competitor.name} made NaN or infinite values: its time says nothing")
    return seconds / len(volumes)


def in_bfloat16(competitor: Competitor) -> bool:
    """Whether it multiplies in bfloat16: the flagship does wherever the hardware can."""
    return has_bfloat16() if competitor.system == "flagship" else competitor.bfloat16


def parameter_count(network: nn.Module) -> int:
    """Number of parameters; buffers (a codebook) do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def peak_memory() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have used, stolen time included."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, kind, 0.0) for kind in kinds)


def machine() -> dict[str, Any]:
    """What a time depends on besides the competitor."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        "versions": {name: version(name) for name in ("torch", "monai", "diffaug")},
    }


def processor() -> str:
    """Name of the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
