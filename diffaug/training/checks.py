"""What has to agree before a fit begins or goes on: plan, options, data and the weights to start from."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffaug.datasets.reading import Dataset
from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json, read_json
from diffaug.generators.generator import Generator
from diffaug.training.architectures import Plan
from diffaug.training.fingerprint import file_hashes
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.medical_diffusion.plan import MedicalDiffusionPlan
from diffaug.training.medical_diffusion.planning import check_memory
from diffaug.training.planning import available_memory
from diffaug.training.subsets import Subsets


def check_plan(plan: Plan, dataset: Dataset, accelerator: Accelerator) -> None:
    """A plan fits together, the dataset, the number of processes and their memory; DiffaugError where it does
    not."""
    problems, processes = plan.problems(), accelerator.num_processes
    for stage in ("autoencoder_training", "denoiser_training"):
        if (batch := getattr(plan, stage).batch) % processes:
            problems.append(f"{stage}.batch is {batch}, which {processes} processes cannot share evenly")
    norm = plan.autoencoder_training.discriminator_norm if isinstance(plan, MedicalDiffusionPlan) else ""
    if processes > 1 and norm == "batch":
        problems.append('discriminator_norm "batch" works in one process alone: take "group"')
    if plan.channels != list(dataset.channels):
        problems.append(f"channels are {plan.channels}, the dataset has {list(dataset.channels)}")
    expected = dataset.labels if isinstance(plan, JointFlowPlan) else {}
    if plan.labels != expected:
        problems.append(f"labels are {plan.labels}, {plan.architecture} with this dataset needs {expected}")
    if problems:
        raise DiffaugError("the plan does not fit:\n" + "\n".join(f"  {p}" for p in problems))
    if isinstance(plan, MedicalDiffusionPlan):
        check_memory(plan.grid, available_memory(accelerator))


def check_same_plan(settled: Plan, asked: Plan | None, file: Path) -> None:
    """A fit that has begun goes on by the plan in `file` alone."""
    if asked is None or asked == settled:
        return
    old, new = _flat(settled.model_dump()), _flat(asked.model_dump())
    lines = [
        f"  {k}: {old.get(k)} there, {new.get(k)} asked"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]
    raise DiffaugError(
        f"{file} holds another plan than the one given:\n"
        + "\n".join(lines)
        + "\nUse another --output, or the same plan."
    )


def check_options(settled: Plan, **given: Any) -> None:
    """Options beside a plan say nothing else than it does."""
    own = {
        "architecture": settled.architecture,
        "preset": getattr(settled, "preset", None),
        "name": settled.name,
        "mirror_axes": settled.augmentation.mirror_axes,
        "seed": settled.seed,
        "budget": settled.budget,
        "extent": settled.extent,
    }
    if wrong := {key: value for key, value in given.items() if value is not None and value != own[key]}:
        lines = [f"  {key}: {own[key]!r} in the plan, {value!r} given" for key, value in wrong.items()]
        raise DiffaugError(
            "the plan decides, and says otherwise:\n"
            + "\n".join(lines)
            + "\nLeave the option out, or edit the plan before a fit begins."
        )


def check_start(settled: Plan, start: Generator | None) -> None:
    """The weights to start from are part of the plan, and have its networks."""
    if settled.init is not None and start is None:
        raise DiffaugError(
            f"the plan starts from the weights {settled.init}: say with --init which generator that is"
        )
    if start is not None and settled.init != start.weights_hash:
        planned = f"the weights {settled.init}" if settled.init else "random weights"
        raise DiffaugError(
            f"the plan starts from {planned}, {start.name} has {start.weights_hash}: leave --init out, or "
            "use another --output"
        )
    if start is not None:
        networks = start.card.networks
        if networks.architecture != settled.architecture:
            raise DiffaugError(
                f"cannot start from {start.name}: it is a {networks.architecture} generator, the plan is for "
                f"{settled.architecture}"
            )
        parts = {part: part for part in type(networks).model_fields if part in type(settled).model_fields}
        if isinstance(settled, MedicalDiffusionPlan):
            parts["steps"] = "diffusion_steps"
        if other := [own for part, own in parts.items() if getattr(settled, own) != getattr(networks, part)]:
            raise DiffaugError(
                f"cannot start from {start.name}: its {', '.join(other)} is of another size than the plan's; "
                "make the plan with --init, or leave --init out"
            )


def check_perceptual(settled: Plan, hashes: tuple[str, ...]) -> None:
    """The weights of the perceptual loss are part of the plan, by their hashes."""
    if isinstance(settled, JointFlowPlan):
        if hashes:
            raise DiffaugError("a perceptual loss is part of medical-diffusion alone: leave it out")
        return
    planned = settled.autoencoder_training.perceptual
    if sorted(planned) != sorted(hashes):
        there, given = (", ".join(each) or "(none)" for each in (planned, hashes))
        raise DiffaugError(
            f"the plan trains with LPIPS from files with the SHA-256 {there}, given are {given}: give the "
            "plan's with --perceptual, or edit the plan before a fit begins"
        )


def check_same_scans(file: Path, subsets: Subsets) -> None:
    """An interrupted fit goes on only with the files it began with."""
    hashes = {
        "train": file_hashes(subsets.train),
        "validation": file_hashes(subsets.validation),
    }
    if not file.exists():
        atomic_write_json(file, hashes)
        return
    before = read_json(file)
    changed = [
        name
        for subset in hashes
        for name in sorted(hashes[subset].keys() | before[subset].keys())
        if hashes[subset].get(name) != before[subset].get(name)
    ]
    if changed:
        raise DiffaugError(
            f"{len(changed)} case(s) were added, removed or changed since this fit began, first "
            f"{changed[:3]}: give another "
            f"--output, or put the files back (their hashes are in {file})"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
