"""Whether what is about to be computed fits into memory."""

import psutil
import torch

from diffaug.errors import DiffaugError


def require_memory(needed: int, device: torch.device, advice: str) -> None:
    """Refuse work that needs more than `needed` bytes where these are not free on a device.

    Raises:
        DiffaugError: says how much there is, and what to do.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB, of which {device} has {free / 2**30:.1f} free"
        raise DiffaugError(f"this takes about {sizes}: {advice}")
