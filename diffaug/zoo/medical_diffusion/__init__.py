"""Checkpoints of Medical Diffusion (Khader et al. 2023) and of DiffTumor (Chen et al. 2024), which have one
format: into a generator, and back out.

The networks travel as a Lightning `.ckpt` (the VQ-GAN, with a pickled configuration) and a `.pt` (the
denoiser, with a copy of the VQ-GAN). Neither says on which grid and in which units the volumes are.
"""

from diffaug.zoo.medical_diffusion.choices import Choices
from diffaug.zoo.medical_diffusion.exporting import export_medical_diffusion
from diffaug.zoo.medical_diffusion.importing import import_medical_diffusion

__all__ = ["Choices", "export_medical_diffusion", "import_medical_diffusion"]
