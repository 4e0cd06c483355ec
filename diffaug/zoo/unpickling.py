"""Reading other people's torch checkpoints without executing anything in them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffaug.errors import CardError


class _Inert:
    """Stands for an object of a foreign library: what it holds is read, nothing of its class is there."""


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


# What Lightning checkpoints with a configuration of omegaconf hold beside tensors and plain values.
_STAND_INS = {
    "omegaconf.dictconfig.DictConfig": _Inert,
    "omegaconf.listconfig.ListConfig": _Inert,
    "omegaconf.base.Metadata": _Inert,
    "omegaconf.base.ContainerMetadata": _Inert,
    "omegaconf.nodes.AnyNode": _Inert,
    "typing.Any": _Inert,
    "builtins.int": _Inert,
    "builtins.list": _Inert,
    "builtins.dict": _Inert,
    "collections.defaultdict": _plain_dict,
}


# Numbers of numpy, such as a loss beside the weights: their type and bytes.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]


def read_checkpoint(path: Path) -> dict[Any, Any]:
    """The tensors (on the CPU) and plain values of a torch checkpoint, in the zip or the older format.

    Configurations of omegaconf come as dicts and lists, with interpolations as text; omegaconf is not
    imported. Everything else is refused before it is made.

    Raises:
        CardError: the file cannot be read, is no checkpoint, or holds objects of any other kind.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    allowed += _NUMPY
    try:
        file = path.open("rb")
    except OSError as error:
        raise CardError(f"cannot read {path}: {error}") from error
    try:
        with file, torch.serialization.safe_globals(allowed):
            content = _plain(torch.load(file, map_location="cpu", weights_only=True))
    # What a damaged or hostile file makes torch raise is anything at all.
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CardError(
                f"{path} holds {found[1]!r}, which is neither a tensor nor a plain value: it was not loaded, "
                "since loading it could run code. Checkpoints of the generators that diffaug imports do not "
                "hold it"
            ) from error
        raise CardError(
            f"{path} is no checkpoint that torch can read, or is not complete ({_reason(error)})"
        ) from error
    if not isinstance(content, dict):
        raise CardError(f"{path} holds a {type(content).__name__}, not the dictionary of a checkpoint")
    return content


def _plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Containers and stand-ins as dicts and lists; what occurs more than once is converted once, since
    nested references can name an object 2^n times."""
    done = {} if done is None else done
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {key: _plain(item, done) for key, item in value.items()}
        elif isinstance(value, (list, tuple)):
            done[id(value)] = [_plain(item, done) for item in value]
        elif isinstance(value, _Inert):
            # Containers keep what they hold in `_content`, leaves in `_val`.
            done[id(value)] = _plain(vars(value).get("_content", vars(value).get("_val")), done)
        else:
            return None if value is _Inert else value
    return done[id(value)]


def _reason(error: Exception) -> str:
    """The sentence of a torch error that says what is wrong."""
    text = str(error)
    found = re.search(r"Unpickler error: (.+)", text) or re.match(r"(.+?)(\. |\n|$)", text)
    return f"{type(error).__name__}: {found[1]}" if found else type(error).__name__
