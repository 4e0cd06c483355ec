"""The networks of any architecture."""

from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.latent_diffusion.networks import LatentDiffusionNetworks
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks

Networks = JointFlowNetworks | MedicalDiffusionNetworks | LatentDiffusionNetworks
