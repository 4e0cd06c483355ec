"""Pretrained weights as other libraries load them, all with `torch.load(weights_only=True)`.

| network | file | who loads it |
|---|---|---|
| MONAI's | `monai.pt` | `network.load_state_dict(torch.load(...), strict=False)` |
| nnU-Net's | `nnunet.pth` | `nnUNetv2_train ... -pretrained_weights` |
| | `nnssl.pth` | nnU-Net's `nnUNetv2_train_pretrained`, which takes the encoder |
| segmentation-models-pytorch-3d's | `smp3d_encoder.pt` | `model.encoder.load_state_dict(torch.load(...))` |
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaug.files import atomic_path, read_json
from diffaug.pretraining.plan import PretrainingPlan
from diffaug.segmentation.networks import is_head

NNUNET = "nnunet.pth"
CITATIONS = [
    {
        "type": "Pretraining",
        "name": "diffaug",
        "apa_citations": [
            "Khader, F., et al. (2023). Denoising diffusion probabilistic models for 3D medical image "
            "generation. Scientific Reports, 13, 7303."
        ],
    }
]


def kept(plan: PretrainingPlan, name: str) -> bool:
    """Whether a tensor of the last stage is of use to a segmentation network: not a head that draws images,
    nor those of self-supervision."""
    method = plan.stages[-1].method
    if method == "swin":
        return name.startswith("swinViT.")
    return method == "supervised" or not is_head(plan.network, name)


def write_handoffs(plan: PretrainingPlan, network: nn.Module, folder: Path) -> list[Path]:
    """Write the files that suit the network; returns them."""
    state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    kind = plan.network.kind
    if kind == "nnunet":
        files: dict[str, Any] = {
            NNUNET: {"network_weights": state},
            "nnssl.pth": nnssl_checkpoint(plan, state),
        }
    elif kind == "smp3d":
        encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
        files = {
            "smp3d_encoder.pt": {name.removeprefix("encoder."): value for name, value in encoder.items()}
        }
    else:
        files = {"monai.pt": {name: value for name, value in state.items() if kept(plan, name)}}
    for name, content in files.items():
        with atomic_path(folder / name) as temporary:
            torch.save(content, temporary)
    return [folder / name for name in files]


def nnssl_checkpoint(plan: PretrainingPlan, state: dict[str, Tensor]) -> dict[str, Any]:
    """The layout of nnssl (v0.1), of which nnU-Net's master takes stem and encoder."""
    settings = plan.network.settings
    plans = read_json(Path(settings["plans"]))
    name = settings.get("configuration", "3d_fullres")
    configuration = plans["configurations"][name]
    architecture = configuration["architecture"]
    spacing, patch = list(plan.space.spacing), list(plan.space.patch)
    own_spacing = plans.get("original_median_spacing_after_transp", spacing)
    first = "encoder.stem" if any(n.startswith("encoder.stem.") for n in state) else "encoder.stages.0"
    convolutions = [name for name in state if name.startswith(first) and name.endswith("conv.weight")]
    return {
        "network_weights": state,
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": architecture["network_class_name"].rsplit(".", 1)[-1],
                "arch_kwargs": architecture["arch_kwargs"],
                "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
            },
            "pretrain_plan": {
                "dataset_name": plans.get("dataset_name", ""),
                "plans_name": plans.get("plans_name", ""),
                "original_median_spacing_after_transp": own_spacing,
                "image_reader_writer": plans.get("image_reader_writer", "SimpleITKIO"),
                "transpose_forward": plans.get("transpose_forward", [0, 1, 2]),
                "transpose_backward": plans.get("transpose_backward", [0, 1, 2]),
                "experiment_planner_used": plans.get("experiment_planner_used", ""),
                "configurations": {
                    name: {
                        "data_identifier": configuration.get("data_identifier", ""),
                        "preprocessor_name": configuration.get("preprocessor_name", "DefaultPreprocessor"),
                        "spacing_style": "median",
                        "normalization_schemes": configuration.get(
                            "normalization_schemes", ["ZScoreNormalization"] * plan.channels
                        ),
                        "use_mask_for_norm": [False] * plan.channels,
                        "resampling_fn_data": configuration.get("resampling_fn_data", ""),
                        "resampling_fn_data_kwargs": configuration.get("resampling_fn_data_kwargs", {}),
                        "resampling_fn_mask": configuration.get("resampling_fn_seg", ""),
                        "resampling_fn_mask_kwargs": configuration.get("resampling_fn_seg_kwargs", {}),
                        "spacing": spacing,
                        "patch_size": patch,
                    }
                },
            },
            "pretrain_num_input_channels": plan.channels,
            "recommended_downstream_patchsize": patch,
            "key_to_encoder": "encoder.stages",
            "key_to_stem": first,
            "keys_to_in_proj": [name.removesuffix(".weight") for name in convolutions],
            "key_to_lpe": None,
        },
        "citations": CITATIONS,
    }
