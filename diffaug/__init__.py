"""Diffusion-based generation and augmentation of labelled 3D medical images.

``diffaug.load(name_or_folder)`` returns a :class:`Generator`. Both names are imported on first use, so that
``import diffaug`` costs milliseconds and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from diffaug.version import __version__

if TYPE_CHECKING:
    from diffaug.generators.generator import Generator
    from diffaug.zoo import load

__all__ = ["Generator", "__version__", "load"]

_HOMES = {"Generator": "diffaug.generators.generator", "load": "diffaug.zoo"}


def __getattr__(name: str) -> object:
    """Import a public name from its home module; raises AttributeError for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
