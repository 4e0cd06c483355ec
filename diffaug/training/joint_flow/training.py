"""The stages of a joint-flow fit: autoencoders, latent cache, denoiser."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.progress import Progress
from diffaug.training.cases import Canvases
from diffaug.training.joint_flow.autoencoder import train_autoencoders
from diffaug.training.joint_flow.denoiser import train_denoiser
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.trained import Trained


def train(
    plan: JointFlowPlan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    initial: JointFlow | None,
) -> Trained:
    """Train all stages, or finish what an earlier call left in `folder`."""
    autoencoders, autoencoder_history = train_autoencoders(
        plan, training, validation, folder, accelerator, progress, initial
    )
    denoiser, denoiser_history = train_denoiser(
        autoencoders,
        plan,
        training,
        validation,
        folder,
        accelerator,
        progress,
        initial=initial.denoiser.state_dict() if initial else None,
    )
    networks = JointFlowNetworks(
        image_autoencoder=plan.image_autoencoder,
        label_autoencoder=plan.label_autoencoder,
        denoiser=plan.denoiser,
    )
    model = JointFlow(networks)
    model.image.load_state_dict(autoencoders.image.state_dict())
    if model.label is not None and autoencoders.label is not None:
        model.label.load_state_dict(autoencoders.label.state_dict())
    model.denoiser.load_state_dict(denoiser.state_dict())
    figures: dict[str, Any] = {}
    if autoencoder_history:
        figures["reconstruction_psnr_db"] = round(autoencoder_history[-1]["psnr"], 2)
        if "label_dice" in autoencoder_history[-1]:
            figures["label_round_trip_dice"] = round(autoencoder_history[-1]["label_dice"], 4)
    if denoiser_history:
        figures["velocity_loss"] = {
            k: round(v, 4)
            for k, v in denoiser_history[-1].items()
            if not k.startswith(("training", "step", "seconds"))
        }
    histories = {"autoencoders": autoencoder_history, "denoiser": denoiser_history}
    return Trained(networks, model, histories, len(validation), figures)
