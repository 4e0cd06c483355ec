"""Small checkpoints in the layouts of MONAI's bundles, MAISI and NV-Generate, with random weights."""

import json
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
AUTOENCODER = {
    "spatial_dims": 3,
    "in_channels": "@image_channels",
    "out_channels": "@image_channels",
    "latent_channels": "@latent_channels",
    "channels": [8, 16, 16],
    "num_res_blocks": 1,
    "norm_num_groups": 8,
    "norm_eps": 1e-06,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "include_fc": False,
}
UNET = {
    "spatial_dims": 3,
    "in_channels": "@latent_channels",
    "out_channels": "@latent_channels",
    "channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 8,
    "include_fc": False,
    "use_combined_linear": False,
}
SCHEDULER = {
    "_target_": "monai.networks.schedulers.DDIMScheduler",
    "num_train_timesteps": 10,
    "schedule": "scaled_linear_beta",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "clip_sample": False,
}


def randomised(network: Network, seed: int = 0) -> Network:
    """Weights that leave nothing at zero, as the last layers of untrained networks are."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return network.eval()


def plain(definition: dict[str, Any], **references: int) -> dict[str, Any]:
    """A definition with its references filled in."""
    return {
        key: references[value[1:]] if isinstance(value, str) and value.startswith("@") else value
        for key, value in definition.items()
        if key != "_target_"
    }


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that GenerativeModels gave them, with its unused projections."""
    renamed = {}
    for key, tensor in state.items():
        name = key.replace(".postconv.", ".conv.")
        if ".transformer_blocks." in name:
            name = name.replace(".out_proj.", ".to_out.0.")
        elif ".attn." in name:
            name = name.replace(".attn.out_proj.", ".proj_attn.").replace(".attn.", ".")
            if ".to_q." in name:
                unused = name.replace(".to_q.", ".proj_attn.")
                renamed.setdefault(unused, torch.zeros_like(tensor))
        renamed[name] = tensor
    return renamed


def write_brats(folder: Path) -> tuple[AutoencoderKL, DiffusionModelUNet]:
    """A bundle as `brats_mri_generative_diffusion`: a configuration, and weights under their old names."""
    autoencoder = randomised(AutoencoderKL(**plain(AUTOENCODER, image_channels=1, latent_channels=4)))
    unet = randomised(DiffusionModelUNet(**plain(UNET, latent_channels=4)), 1)
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    torch.save(old_names(autoencoder.state_dict()), folder / "models" / "model_autoencoder.pt")
    torch.save(old_names(unet.state_dict()), folder / "models" / "model.pt")
    configuration = {
        "imports": ["$import torch", "$import os"],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "image_channels": 1,
        "latent_channels": 4,
        "latent_shape": ["@latent_channels", 4, 6, 4],
        "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", **AUTOENCODER},
        "network_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", **UNET},
        "load_autoencoder": "$@autoencoder_def.load_old_state_dict(torch.load('models/model.pt'))",
        "noise": "$torch.randn([1]+@latent_shape).to(@device)",
        "noise_scheduler": SCHEDULER,
    }
    (folder / "configs" / "inference.json").write_text(json.dumps(configuration))
    return autoencoder, unet


def write_brain(folder: Path) -> DiffusionModelUNet:
    """A bundle as `brain_image_synthesis_latent_diffusion_model`: old class names, four conditions."""
    sizes = plain(AUTOENCODER, image_channels=1, latent_channels=3) | {"channels": [8, 16, 16, 16]}
    sizes |= {"attention_levels": [False] * 4}
    autoencoder = randomised(AutoencoderKL(**sizes))
    unet_sizes = plain(UNET, latent_channels=3) | {
        "in_channels": 7,
        "include_fc": True,
        "resblock_updown": True,
        "with_conditioning": True,
        "cross_attention_dim": 4,
        "upcast_attention": True,
    }
    unet = randomised(DiffusionModelUNet(**unet_sizes), 1)
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    torch.save(old_names(autoencoder.state_dict()), folder / "models" / "autoencoder.pth")
    torch.save(old_names(unet.state_dict()), folder / "models" / "diffusion_model.pth")
    for old in (sizes, unet_sizes):
        old["num_channels"] = old.pop("channels")
    # GenerativeModels had no such argument.
    for name in ("include_fc", "use_combined_linear"):
        unet_sizes.pop(name)
    configuration = {
        "autoencoder_def": {"_target_": "generative.networks.nets.AutoencoderKL", **sizes},
        "diffusion_def": {"_target_": "generative.networks.nets.DiffusionModelUNet", **unet_sizes},
        "scheduler": SCHEDULER
        | {"_target_": "generative.networks.schedulers.DDIMScheduler", "beta_end": 0.0205},
    }
    (folder / "configs" / "inference.json").write_text(json.dumps(configuration))
    return unet


MAISI_AUTOENCODER = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_channels": [8, 16, 16],
    "num_res_blocks": [1, 1, 1],
    "norm_num_groups": 8,
    "norm_eps": 1e-06,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_checkpointing": False,
    "use_convtranspose": False,
    "norm_float16": True,
    "num_splits": 2,
    "dim_split": 1,
}
MAISI_UNET = {
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "num_channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 8,
    "use_flash_attention": True,
    "include_spacing_input": True,
}
REGIONS = {"include_top_region_index_input": True, "include_bottom_region_index_input": True}
FLOW = {"num_class_embeds": 128, "resblock_updown": True, "include_fc": True}
CONTROL = {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [4, 8, 8]}
LABELS = {"liver": 1, "spleen": 3, "colon": 62, "lung tumor": 23}
_MAISI = "monai.apps.generation.maisi.networks."


def write_maisi(folder: Path, *, flow: bool) -> dict[str, nn.Module]:
    """Files as those of maisi_ct_generative (or, `flow`, of NV-Generate), with definitions beside them."""
    unet_sizes = MAISI_UNET | (FLOW if flow else REGIONS)
    here = {key: value for key, value in unet_sizes.items() if key != "use_flash_attention"}
    trunk = {
        key: value
        for key, value in here.items()
        if key not in ("out_channels", "include_spacing_input", *REGIONS)
    }
    networks: dict[str, nn.Module] = {
        "autoencoder": randomised(AutoencoderKlMaisi(**MAISI_AUTOENCODER | {"norm_float16": False})),
        "denoiser": randomised(DiffusionModelUNetMaisi(**here), 1),
        "control": randomised(ControlNetMaisi(**trunk, **CONTROL), 2),
    }
    folder.mkdir(parents=True)
    autoencoder = networks["autoencoder"].state_dict()
    # NV-Generate's loader finds an autoencoder wrapped or not.
    torch.save({"unet_state_dict": autoencoder} if flow else autoencoder, folder / "autoencoder.pt")
    torch.save(
        {"unet_state_dict": networks["denoiser"].state_dict(), "scale_factor": torch.tensor(2.5), "epoch": 3},
        folder / "denoiser.pt",
    )
    torch.save({"controlnet_state_dict": networks["control"].state_dict()}, folder / "control.pt")
    scheduler = {
        "_target_": "monai.networks.schedulers.rectified_flow.RFlowScheduler",
        "num_train_timesteps": 1000,
        "use_discrete_timesteps": False,
        "use_timestep_transform": True,
        "sample_method": "uniform",
        "scale": 1.4,
    }
    definitions = {
        "autoencoder_def": {
            "_target_": f"{_MAISI}autoencoderkl_maisi.AutoencoderKlMaisi",
            **MAISI_AUTOENCODER,
        },
        "diffusion_unet_def": {
            "_target_": f"{_MAISI}diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
            **unet_sizes,
        },
        "controlnet_def": {"_target_": f"{_MAISI}controlnet_maisi.ControlNetMaisi", **trunk, **CONTROL},
        "mask_generation_diffusion_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", "x": "$1/0"},
        "noise_scheduler": scheduler if flow else SCHEDULER,
    }
    (folder / "config.json").write_text(json.dumps(definitions))
    (folder / "label_dict.json").write_text(json.dumps(LABELS))
    return networks


def zipped(folder: Path, file: Path, **more: str) -> Path:
    """The folder as a zip, with more members."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path("bundle") / path.relative_to(folder))
        for name, content in more.items():
            archive.writestr(name, content)
    return file
