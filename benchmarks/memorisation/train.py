"""Train the denoiser of `hippocampus-mr` once more, on its own autoencoders, and keep twenty generators.

Stopped at any moment, the same command goes on; `--as-it-is` writes the generators that it has by then.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from diffaug.cli.allocator import keep_freed_memory
from diffaug.datasets.reading import read_dataset
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.progress import Progress
from diffaug.training.cases import make_canvases
from diffaug.training.joint_flow.autoencoder import Autoencoders
from diffaug.training.joint_flow.denoiser import train_denoiser
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.processes import make_accelerator
from diffaug.training.subsets import split_cases
from diffaug.zoo import load

NAME = "hippocampus-mr"
# The learning rate falls from the twelfth of them on.
SNAPSHOTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds Task04_Hippocampus")
    parser.add_argument("--output", type=Path, required=True, help="folder of the generators")
    parser.add_argument(
        "--as-it-is", action="store_true", help="train no further: write the generators that are there"
    )
    options = parser.parse_args()

    keep_freed_memory()
    generator = load(NAME)
    model = generator.model
    assert isinstance(model, JointFlow)
    plan = JointFlowPlan.model_validate(generator.plan)
    training = plan.denoiser_training.model_copy(update={"snapshots": SNAPSHOTS})
    plan = plan.model_copy(update={"denoiser_training": training})
    private = options.output / "private"
    progress = Progress()
    if not options.as_it_is:
        train(plan, model, options.data / "Task04_Hippocampus", private, progress)
    for step in training.snapshot_steps:
        file = private / "snapshots" / f"step_{step:06d}.safetensors"
        if not file.exists():
            continue
        model.denoiser.load_state_dict(load_file(file))
        own = generator.card.training.model_copy(update={"denoiser_steps": step})
        generator.card = generator.card.model_copy(
            update={"name": f"{NAME}-step-{step}", "training": own, "figures": {}}
        )
        generator.save(options.output / f"step-{step}")
        progress.note(f"{options.output / f'step-{step}'}: the generator after {step} steps")


def train(plan: JointFlowPlan, model: JointFlow, dataset: Path, private: Path, progress: Progress) -> None:
    """Train the denoiser from the start, or from where an earlier call was stopped."""
    autoencoders = Autoencoders(plan)
    autoencoders.image.load_state_dict(model.image.state_dict())
    if model.label is not None and autoencoders.label is not None:
        autoencoders.label.load_state_dict(model.label.state_dict())
    autoencoders.eval().requires_grad_(False)
    subsets = split_cases(read_dataset(dataset), plan.seed)
    canvases = [
        make_canvases(plan, cases, private / name, progress)
        for name, cases in (("training", subsets.train), ("validation", subsets.validation))
    ]
    train_denoiser(autoencoders, plan, *canvases, private, make_accelerator("cpu"), progress)


if __name__ == "__main__":
    main()
