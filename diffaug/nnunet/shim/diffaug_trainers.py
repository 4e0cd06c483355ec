"""Where nnU-Net finds the trainers by name: `export nnUNet_extTrainer=$(diffaug nnunet trainer-dir)`.

Classes that were defined in this folder could not be pickled, since nnU-Net forgets its modules again.
"""

from diffaug.nnunet.trainers import (
    nnUNetTrainerDiffAug,
    nnUNetTrainerDiffAugGPU,
    nnUNetTrainerDiffAugSteps,
    nnUNetTrainerSteps,
)

__all__ = [
    "nnUNetTrainerDiffAug",
    "nnUNetTrainerDiffAugGPU",
    "nnUNetTrainerDiffAugSteps",
    "nnUNetTrainerSteps",
]
