"""The networks that a bundle's JSON configuration defines, read without running anything in it.

MONAI executes text that begins with `$` as Python. Here only references (`@name`, `@name::part`) and the few
expressions below are understood; anything else where a network's definition needs it is an error.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffaug.errors import CardError
from diffaug.generators.latent_diffusion.networks import DiscreteProcess, FlowProcess
from diffaug.generators.latent_diffusion.sizes import AutoencoderKLSizes, ControlNetSizes, DiffusionUNetSizes

_REFERENCE = re.compile(r"@[A-Za-z_][\w]*(?:::\w+|#\w+)*")
# Expressions whose value is known without running them: a reference, and numbers.
_KNOWN = re.compile(r"\$(@[\w:#]+)|\$\(?(-?\d+(?:\.\d+)?(?:e-?\d+)?)\)?")
# References that lead in a circle.
_DEEPEST = 50
# Values that are looked at; a bundle's configuration has some hundred.
_MOST_VALUES = 100_000
# What changes neither parameters nor results, or what is computed here in another way.
_IGNORED = {
    "spatial_dims",
    "use_flash_attention",
    "use_checkpointing",
    "use_checkpoint",
    "num_splits",
    "dim_split",
    "norm_float16",
    "print_info",
    "save_mem",
    "dropout_cattn",
}
# Defaults of MAISI's autoencoder, where they are not those of AutoencoderKL.
_MAISI_AUTOENCODER = {
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "include_fc": False,
}
_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "RFlowScheduler")


class Configuration:
    """A JSON file of definitions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CardError(f"cannot read {path}: {error}") from error
        if not isinstance(content, dict):
            raise CardError(f"{path} holds a {type(content).__name__}, not the definitions of a bundle")
        self._content: dict[str, Any] = content
        self._budget = _MOST_VALUES

    def network(self, *classes: str) -> dict[str, Any] | None:
        """The arguments of the one definition of a class, with the class's name as `kind`; None for none."""
        found = [
            (name, value)
            for name, value in self._content.items()
            if isinstance(value, dict) and str(value.get("_target_", "")).rsplit(".", 1)[-1] in classes
        ]
        # A mask generator beside the image's networks has names of its own.
        if len(found) > 1:
            found = [each for each in found if "mask" not in each[0]]
        if not found:
            return None
        if len(found) > 1:
            names = ", ".join(name for name, _ in found)
            raise CardError(f"{self.path} defines several networks of one kind ({names}): keep one of them")
        name, definition = found[0]
        arguments = {key: self.value(value, f"{name}.{key}") for key, value in definition.items()}
        kind = str(arguments.pop("_target_")).rsplit(".", 1)[-1]
        return {key: value for key, value in arguments.items() if key not in _IGNORED} | {"kind": kind}

    def entry(self, *names: str) -> Any:
        """The value of the first of these entries that there is, or None."""
        for name in names:
            if name in self._content:
                return self.value(self._content[name], name)
        return None

    def value(self, value: Any, where: str, depth: int = 0) -> Any:
        """A value without references.

        Raises:
            CardError: it needs an expression that is not understood, or leads in a circle.
        """
        self._budget -= 1
        if depth > _DEEPEST or self._budget < 0:
            raise CardError(f"{self.path}: {where} refers to itself, or to too much")
        if isinstance(value, dict):
            return {key: self.value(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, where, depth + 1) for item in value]
        if not isinstance(value, str):
            return value
        if value.startswith("$"):
            known = _KNOWN.fullmatch(value)
            if known is None:
                raise CardError(
                    f"{self.path}: {where} is the expression {value!r}. Expressions are Python code and are "
                    "not run: write its value into a copy of the file"
                )
            if known[2] is not None:
                number = float(known[2])
                return int(number) if number.is_integer() and "." not in known[2] else number
            value = known[1]
        if value.startswith("@"):
            if not _REFERENCE.fullmatch(value):
                raise CardError(f"{self.path}: {where} is {value!r}, which is no reference")
            target: Any = self._content
            for part in re.split(r"::|#", value[1:]):
                try:
                    target = target[int(part)] if isinstance(target, list) else target[part]
                except (KeyError, IndexError, ValueError, TypeError) as error:
                    raise CardError(f"{self.path}: {where} refers to {value}, which there is not") from error
            return self.value(target, where, depth + 1)
        return value

    # -- what diffaug knows ----------------------------------------------------------------------------------

    def autoencoder(self) -> AutoencoderKLSizes | None:
        """Sizes of the autoencoder."""
        found = self.network("AutoencoderKL", "AutoencoderKlMaisi")
        if found is None:
            return None
        if found["kind"] == "AutoencoderKlMaisi":
            found = _MAISI_AUTOENCODER | found
        return self._sizes(AutoencoderKLSizes, _renamed(found))

    def denoiser(self) -> DiffusionUNetSizes | None:
        """Sizes of the denoiser."""
        found = self.network("DiffusionModelUNet", "DiffusionModelUNetMaisi")
        if found is None:
            return None
        if found["kind"] == "DiffusionModelUNetMaisi":
            found = {"include_fc": False} | found
        return self._sizes(DiffusionUNetSizes, _renamed(found))

    def control(self) -> ControlNetSizes | None:
        """Sizes of the ControlNet beside those of its trunk."""
        found = self.network("ControlNetMaisi")
        if found is None:
            return None
        own = {
            "bits": found.get("conditioning_embedding_in_channels", 8),
            "embedding_channels": found.get("conditioning_embedding_num_channels", (8, 32, 64)),
        }
        return self._sizes(ControlNetSizes, own)

    def process(self) -> DiscreteProcess | FlowProcess | None:
        """The diffusion process of the scheduler."""
        found = self.network(*_SCHEDULERS)
        if found is None:
            return None
        steps = found.get("num_train_timesteps", 1000)
        if found["kind"] == "RFlowScheduler":
            shifts = found.get("use_timestep_transform", False)
            return self._sizes(FlowProcess, {"steps": steps, "shifts": shifts})
        # Each with MONAI's own default, and what diffaug knows.
        given: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "schedule": ("linear_beta", ("scaled_linear_beta", "scaled_linear")),
            "prediction_type": ("epsilon", ("epsilon",)),
        }
        if found["kind"] != "PNDMScheduler":
            given["clip_sample"] = (True, (False,))
        for name, (default, allowed) in given.items():
            if (value := found.get(name, default)) not in allowed:
                raise CardError(
                    f"{self.path}: the scheduler's {name} is {value!r}; diffaug knows {allowed[0]!r} alone"
                )
        betas = {"beta_start": 1e-4, "beta_end": 2e-2}
        own = {name: found.get(name, default) for name, default in betas.items()}
        return self._sizes(DiscreteProcess, {"steps": steps, **own})

    def _sizes(self, kind: Any, found: Mapping[str, Any]) -> Any:
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise CardError(f"{self.path} defines networks that diffaug does not know: {problems}") from error


def _renamed(found: dict[str, Any]) -> dict[str, Any]:
    """With today's names of the arguments."""
    found = dict(found)
    if "num_channels" in found:
        found["channels"] = found.pop("num_channels")
    return found
