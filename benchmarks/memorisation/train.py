"""Train the denoiser of `hippocampus-mr` once more, on its own autoencoders, and keep six generators.

Stopped at any moment, the same command goes on.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from diffaug.datasets.reading import read_dataset
from diffaug.generators.joint_flow import JointFlow
from diffaug.progress import Progress
from diffaug.training.cases import make_canvases
from diffaug.training.joint_flow.autoencoder import Autoencoders
from diffaug.training.joint_flow.denoiser import train_denoiser
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.processes import make_accelerator
from diffaug.training.subsets import split_cases
from diffaug.zoo import load

NAME = "hippocampus-mr"
# The learning rate falls from the sixth tenth of the steps on.
SNAPSHOTS, KEPT = 10, (3, 6, 7, 8, 9, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds Task04_Hippocampus")
    parser.add_argument("--output", type=Path, required=True, help="folder of the six generators")
    options = parser.parse_args()

    generator = load(NAME)
    model = generator.model
    assert isinstance(model, JointFlow)
    plan = JointFlowPlan.model_validate(generator.plan)
    training = plan.denoiser_training.model_copy(update={"snapshots": SNAPSHOTS})
    plan = plan.model_copy(update={"denoiser_training": training})
    autoencoders = Autoencoders(plan)
    autoencoders.image.load_state_dict(model.image.state_dict())
    if model.label is not None and autoencoders.label is not None:
        autoencoders.label.load_state_dict(model.label.state_dict())
    autoencoders.eval().requires_grad_(False)

    progress, accelerator = Progress(), make_accelerator("cpu")
    subsets = split_cases(read_dataset(options.data / "Task04_Hippocampus"), plan.seed)
    private = options.output / "private"
    canvases = [
        make_canvases(plan, cases, private / name, progress)
        for name, cases in (("training", subsets.train), ("validation", subsets.validation))
    ]
    train_denoiser(autoencoders, plan, *canvases, private, accelerator, progress)
    for step in (training.snapshot_steps[tenth - 1] for tenth in KEPT):
        weights = load_file(private / "snapshots" / f"step_{step:06d}.safetensors")
        model.denoiser.load_state_dict(weights)
        own = generator.card.training.model_copy(update={"denoiser_steps": step})
        generator.card = generator.card.model_copy(
            update={"name": f"{NAME}-step-{step}", "training": own, "figures": {}}
        )
        generator.save(options.output / f"step-{step}")
        progress.note(f"{options.output / f'step-{step}'}: the generator after {step} steps")


if __name__ == "__main__":
    main()
