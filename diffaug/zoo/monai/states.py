"""The tensors in checkpoint files of MONAI's generators, under the names that MONAI's networks have today."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaug.errors import CardError
from diffaug.generators.model import misfit
from diffaug.zoo.unpickling import read_checkpoint

State = dict[str, Tensor]
# Under which weights lie beside other things.
_WRAPPERS = ("unet_state_dict", "controlnet_state_dict", "state_dict", "model")
_OLD_ATTENTION = re.compile(r"(.*)\.(to_q|to_k|to_v|proj_attn)\.(weight|bias)")


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """The weights in a file, and what lies beside them, such as `scale_factor`.

    Raises:
        CardError: the file holds no weights.
    """
    # MONAI says by itself which of its own classes, such as MetaTensor, may be read.
    import monai.data  # noqa: F401

    content = read_checkpoint(path)
    beside: dict[str, Any] = {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            beside = {key: value for key, value in content.items() if key != wrapper}
            content = content[wrapper]
            break
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        some = ", ".join(wrong[:5]) or "nothing"
        raise CardError(f"{path} holds {some} where a network's tensors should be")
    return state, beside


def scale_factor(beside: dict[str, Any], path: Path) -> float | None:
    """The factor of the latents that a file states, or None."""
    found = beside.get("scale_factor")
    if found is None:
        return None
    number = float(torch.as_tensor(found).reshape(-1)[0]) if isinstance(found, (Tensor, float, int)) else 0.0
    if not 0 < number < float("inf"):
        raise CardError(f"{path} says scale_factor = {found!r}, which is no factor above 0")
    return number


def load_state(network: nn.Module, state: State, path: Path) -> list[str]:
    """Fill a network with a file's tensors, all of them.

    Returns:
        What was left out, and why: the last layer of the old attention, which these networks had and never
        used.

    Raises:
        CardError: names of tensors that are missing, not expected, or of another shape.
    """
    own = network.state_dict()
    renamed = {new_name(key, own.keys()): tensor for key, tensor in state.items()}
    unused = [key for key in renamed if key not in own and ".proj_attn." in key]
    for key in unused:
        del renamed[key]
    if problem := misfit(renamed, own):
        raise CardError(
            f"{path} does not fit the {type(network).__name__} of {sum(p.numel() for p in own.values()):,} "
            f"numbers that it should: {problem}"
        )
    broken = [key for key, tensor in renamed.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CardError(f"{path} holds NaN or infinite numbers in {', '.join(broken[:3])}: get it again")
    network.load_state_dict({key: tensor.to(own[key].dtype) for key, tensor in renamed.items()})
    notes = []
    if unused:
        notes.append(
            f"{path.name}: {len(unused)} tensors of attention layers' last projection were left out, which "
            "the old networks had and did not apply"
        )
    return notes


def new_name(key: str, known: Any) -> str:
    """Today's name of a tensor; `key` itself where it is one, or none is found."""
    if key in known:
        return key
    if found := _OLD_ATTENTION.fullmatch(key):
        block, part, kind = found.groups()
        candidate = f"{block}.attn.{'out_proj' if part == 'proj_attn' else part}.{kind}"
        if candidate in known:
            return candidate
    for old, new in ((".to_out.0.", ".out_proj."), (".conv.conv.", ".postconv.conv.")):
        if old in key and (candidate := key.replace(old, new)) in known:
            return candidate
    return key
