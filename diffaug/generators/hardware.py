"""What the hardware at hand does well."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import nn

from diffaug.errors import DiffaugError


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether `device` multiplies matrices in bfloat16 in hardware.

    On two Zen 5 cores bfloat16 products ran at 900 GFLOP/s against 200 in float32; on a processor that
    emulates them they are slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_device(device: torch.device | str) -> None:
    """Refuse a device that torch does not know or cannot use here.

    Raises:
        DiffaugError: names the device.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DiffaugError(f"cannot use the device {device!s}: {error}") from error


@contextmanager
def mixed_precision(network: nn.Module, device: torch.device, enabled: bool) -> Iterator[None]:
    """bfloat16 autocast, in which the weights of the network's linear layers are cast once, not at each call.

    Autocast keeps its copies of weights that require a gradient for as long as it lasts, and makes those of
    all others anew. That is a twentieth of a call of the flagship's denoiser, and a fifth of Medical
    Diffusion's (one case on two Zen 5 cores). Convolutions gain nothing by it.
    """
    weights = [p for m in network.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


_exact = Lock()
_exact_depth = 0
_before: tuple[bool, str] = (True, "highest")


@contextmanager
def exact_float32() -> Iterator[None]:
    """True float32 on GPUs, whose convolutions would round to 10 bits (TF32) by default, and products where
    the process asked for it.

    The switches are the process's: they stay until the last of its threads has left, and other networks that
    run meanwhile are slower.
    """
    global _exact_depth, _before
    with _exact:
        _exact_depth += 1
        if _exact_depth == 1:
            _before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _exact:
            _exact_depth -= 1
            if _exact_depth == 0:
                torch.backends.cudnn.allow_tf32 = _before[0]
                torch.set_float32_matmul_precision(_before[1])
