"""Pretrained weights into a network: what fits, and what not and why."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffaug.errors import DiffaugError

# Less of a network than this is hardly loaded on purpose: an encoder alone is a third of its tensors or more.
LITTLE = 0.25
_SHAPE = "shape"


@dataclass(frozen=True)
class Loaded:
    """What came of loading weights.

    Attributes:
        loaded: names of the network's parameters that were filled.
        left_out: name -> reason, of the network's that keep their random values.
        unused: names of weights that the network has no place for.
    """

    loaded: tuple[str, ...]
    left_out: dict[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            if reason.startswith(_SHAPE):
                reasons.setdefault("of another shape", []).append(f"{name} ({reason})")
            else:
                reasons.setdefault(reason, []).append(name)
        lines = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.left_out)} tensors"]
        lines += [f"{reason}: {_shown(names)}" for reason, names in reasons.items()]
        if self.unused:
            lines.append(f"not in the network: {_shown(list(self.unused))}")
        return "; ".join(lines)


def load_pretrained(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    skip: Callable[[str], bool] = lambda _: False,
    why: str = "left out as asked",
) -> Loaded:
    """Fill a network's parameters and buffers with weights of the same name and shape.

    Warns where these are less than a quarter of what was to be filled: most likely it is another network.

    Args:
        network: is changed in place.
        weights: by name, such as `state_dict()` gives them.
        skip: names that keep their random values.
        why: what is said of those.

    Raises:
        DiffaugError: nothing fits.
    """
    own = tensors(network)
    loaded, left_out = [], {}
    with torch.no_grad():
        for name, tensor in own.items():
            if skip(name):
                left_out[name] = why
            elif name not in weights:
                left_out[name] = "not among the weights"
            elif weights[name].shape != tensor.shape:
                left_out[name] = f"{_SHAPE} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            else:
                tensor.copy_(weights[name])
                loaded.append(name)
    # Names under which a network keeps a tensor a second time are no loss.
    unused = tuple(name for name in weights if name not in own and name not in network.state_dict())
    result = Loaded(tuple(loaded), left_out, unused)
    if not loaded:
        raise DiffaugError(f"none of the weights fits the network: {result}")
    if len(loaded) < LITTLE * sum(not skip(name) for name in own):
        warnings.warn(
            f"few of the weights fit the network, which most likely is not the one of plan.json: {result}",
            stacklevel=2,
        )
    return result


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each under one name alone."""
    return dict(network.named_parameters()) | {
        name: buffer for name, buffer in network.named_buffers() if name in network.state_dict()
    }


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
