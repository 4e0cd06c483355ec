"""From a card's networks to the model that has them."""

from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.latent_diffusion.model import LatentDiffusion
from diffaug.generators.medical_diffusion.model import MedicalDiffusion
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.model import Model
from diffaug.generators.networks import Networks


def make_model(networks: Networks) -> Model:
    """A model with random weights."""
    if isinstance(networks, JointFlowNetworks):
        return JointFlow(networks)
    if isinstance(networks, MedicalDiffusionNetworks):
        return MedicalDiffusion(networks)
    return LatentDiffusion(networks)
