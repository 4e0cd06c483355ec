"""What the two kinds of checkpoint file hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from diffaug.errors import CardError
from diffaug.generators.diffusion import CosineSchedule
from diffaug.generators.model import misfit
from diffaug.zoo.medical_diffusion.choices import Choices, problems
from diffaug.zoo.unpickling import read_checkpoint

State = dict[str, Tensor]

# Entry of the .ckpt in which an exported generator says what the authors' layout has no place for.
OWN_ENTRY = "diffaug"
SCHEDULE = tuple(CosineSchedule(1).buffers())
# Discriminators and LPIPS, which only training uses.
TRAINING_ONLY = ("image_discriminator.", "video_discriminator.", "perceptual_model.")


@dataclass(frozen=True)
class AutoencoderFile:
    """A VQ-GAN: its tensors without what only training uses, what the file says about it, and the batches it
    was trained on."""

    path: Path
    state: State
    said: Choices
    steps: int = 0


@dataclass(frozen=True)
class DenoiserFile:
    """A U-Net, the schedule's tables, and the VQ-GAN that lies beside them (None where there is none)."""

    path: Path
    state: State
    schedule: State
    autoencoder: AutoencoderFile | None
    steps: int


def read_autoencoder(path: Path, choices: Choices) -> AutoencoderFile:
    """Read a `.ckpt`; what `choices` say already is not read from its configuration.

    Raises:
        CardError: it cannot be read, is another kind of file, or its configuration does not make sense.
    """
    content = read_checkpoint(path)
    if "ema" in content or "model" in content:
        raise CardError(f"{path} is a denoiser (it has 'model' or 'ema'): give it as --denoiser")
    state = _tensors(content, "state_dict", path, "an autoencoder's Lightning checkpoint")
    steps = content.get("global_step")
    return AutoencoderFile(
        path,
        _for_inference(state, "", path),
        _said(content, choices, path),
        # Lightning counts a step for each of the two optimisers.
        steps // 2 if isinstance(steps, int) else 0,
    )


def read_denoiser(path: Path, weights: str) -> DenoiserFile:
    """Read a `.pt`; `weights` are 'ema' (averaged) or 'model'.

    Raises:
        CardError: it cannot be read, is another kind of file, or holds networks that are not supported.
    """
    content = read_checkpoint(path)
    if "state_dict" in content and not {"ema", "model"} & content.keys():
        raise CardError(f"{path} is an autoencoder (it has a 'state_dict'): give it as --autoencoder")
    state = _tensors(content, weights, path, "a denoiser's checkpoint")
    parts: dict[str, State] = {"denoise_fn.": {}, "vqgan.": {}, "": {}}
    for key, tensor in state.items():
        prefix = next(p for p in parts if key.startswith(p))
        parts[prefix][key.removeprefix(prefix)] = tensor
    schedule = {key: parts[""].pop(key) for key in SCHEDULE if key in parts[""]}
    _refuse_other_denoisers(parts["denoise_fn."] | parts[""], path)
    if not parts["denoise_fn."]:
        raise CardError(f"{path} has no tensors under 'denoise_fn.' in {weights!r}: it holds no denoiser")
    if parts[""]:
        # Listed as part of the schedule: the only tensors without a prefix.
        raise CardError(f"{path} does not fit: {misfit(schedule | parts[''], dict(schedule))}")
    found = _for_inference(parts["vqgan."], "vqgan.", path)
    steps = content.get("step")
    return DenoiserFile(
        path,
        parts["denoise_fn."],
        schedule,
        AutoencoderFile(path, found, Choices()) if found else None,
        steps if isinstance(steps, int) else 0,
    )


def _tensors(content: dict[Any, Any], name: str, path: Path, kind: str) -> State:
    """The state dict of that name, in float32."""
    state = content.get(name)
    if not isinstance(state, dict) or not state:
        raise CardError(
            f"{path} is not {kind}, which holds its weights as {name!r}: it has "
            f"{sorted(map(str, content))[:8]}"
        )
    if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise CardError(f"{path}: {name}[{wrong[0]!r}] is a {type(state[wrong[0]]).__name__}, not a tensor")
    # A stride of 0 lets a few bytes claim to be any size.
    if wrong := [k for k, t in state.items() if t.numel() * t.element_size() > t.untyped_storage().nbytes()]:
        raise CardError(
            f"{path}: {name}[{wrong[0]!r}] says that it has {state[wrong[0]].numel()} numbers, more than the "
            "file holds"
        )
    return {str(key): t.detach().float() if t.is_floating_point() else t for key, t in state.items()}


def _for_inference(state: State, prefix: str, path: Path) -> State:
    """The tensors that inference needs; raises a CardError for batch norm."""
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(TRAINING_ONLY)}
    if found := [key for key in kept if key.endswith("running_mean")]:
        raise CardError(
            f"{path}: the VQ-GAN has batch norm ({prefix}{found[0]}); only networks with group norm "
            "(norm_type: group) are supported"
        )
    return kept


def _refuse_other_denoisers(state: State, path: Path) -> None:
    monai = ("time_embedder.", "inc.", "outc.", "encoders.", "decoders.")
    if found := [key for key in state if key.startswith(monai)]:
        raise CardError(
            f"{path} holds the alternative denoiser `UNet` made of MONAI blocks (it has {found[0]}); only "
            "`Unet3D` (init_conv, downs, ups, ...) is supported"
        )
    if "null_cond_emb" in state:
        raise CardError(
            f"{path} holds a denoiser conditioned on a vector of {state['null_cond_emb'].shape[-1]} numbers "
            "(it has null_cond_emb); only denoisers without one are supported"
        )


def _said(content: dict[Any, Any], choices: Choices, path: Path) -> Choices:
    """What the configuration says, and what an exported generator adds."""
    parameters = content.get("hyper_parameters")
    cfg = parameters.get("cfg") if isinstance(parameters, dict) else None
    model, dataset = (
        part if isinstance(part, dict) else {}
        for part in ((cfg.get("model"), cfg.get("dataset")) if isinstance(cfg, dict) else (None, None))
    )
    norm = model.get("norm_type")
    if norm not in (None, "group"):
        raise CardError(
            f"{path}: cfg.model.norm_type is {norm if isinstance(norm, str) else type(norm).__name__!r}; "
            "only networks with group norm are supported"
        )
    factors = model.get("downsample")
    found = {
        "downsampling": [factors] * 3 if isinstance(factors, int) else factors,
        "groups": model.get("num_groups"),
        "padding": model.get("padding_type"),
        "dataset": dataset.get("name"),
    }
    asked = {
        name: value for name, value in found.items() if value is not None and getattr(choices, name) is None
    }
    own = content.get(OWN_ENTRY, {})
    try:
        return Choices(**asked).over(Choices.model_validate(own))
    except ValidationError as error:
        raise CardError(
            f"{path}: its configuration does not make sense ({problems(error)}); say it by the option of "
            "the same name"
        ) from error
