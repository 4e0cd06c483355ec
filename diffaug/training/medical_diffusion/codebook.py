"""How training moves the codes: first filled from a batch, then moving averages, dead ones restarted.

Van den Oord et al. 2017 (appendix A) for the averages, Dhariwal et al. 2020 (Jukebox) for the restarts.
"""

import torch
from torch import Tensor, distributed

from diffaug.generators.medical_diffusion.vqgan import Codebook

DECAY = 0.99


@torch.no_grad()
def initialise(codebook: Codebook, z: Tensor, generator: torch.Generator) -> None:
    """Replace all codes by randomly chosen latents of a batch `(B, Z, d, h, w)`, unless that was done
    before: a resumed or imported codebook stays as it is."""
    if bool(codebook.initialised):
        return
    chosen = _random_latents(codebook, _rows(z), generator)
    codebook.embeddings.copy_(chosen)
    codebook.z_avg.copy_(chosen)
    codebook.N.fill_(1.0)
    codebook.initialised.fill_(True)


@torch.no_grad()
def update(codebook: Codebook, z: Tensor, indices: Tensor, generator: torch.Generator) -> None:
    """Move the codes to the moving average of the latents `(B, Z, d, h, w)` that chose them, in float32; then
    overwrite dead ones by random latents of the batch (until the next update).

    Once a batch; the authors' code does it twice, once for each optimizer.
    """
    rows, chosen = _rows(z), indices.flatten()
    counts = torch.bincount(chosen, minlength=len(codebook.N)).float()
    sums = torch.zeros_like(codebook.z_avg).index_add_(0, chosen, rows)
    if _is_distributed():
        distributed.all_reduce(counts)
        distributed.all_reduce(sums)
    codebook.N.lerp_(counts, 1 - DECAY)
    codebook.z_avg.lerp_(sums, 1 - DECAY)
    total = codebook.N.sum()
    weights = (codebook.N + 1e-7) / (total + len(codebook.N) * 1e-7) * total
    codebook.embeddings.copy_(codebook.z_avg / weights[:, None])
    restarted = _random_latents(codebook, rows, generator)
    codebook.embeddings.copy_(torch.where(codebook.live[:, None], codebook.embeddings, restarted))


@torch.no_grad()
def drop_dead(codebook: Codebook) -> None:
    """Overwrite dead codes by copies of the code that is used most: they are latents of cases in the last
    batch, which no generator should hold, let alone decode from. Without live ones all stay."""
    if bool(codebook.live.any()):
        live, used_most = codebook.live[:, None], int(codebook.N.argmax())
        codebook.embeddings.copy_(torch.where(live, codebook.embeddings, codebook.embeddings[used_most]))
        sums = codebook.embeddings * codebook.N[:, None]
        codebook.z_avg.copy_(torch.where(live, codebook.z_avg, sums))


def perplexity(indices: Tensor, codes: int) -> float:
    """exp of the entropy of how often each code is used: the number of codes that are, if all alike."""
    p = torch.bincount(indices.flatten(), minlength=codes).float()
    p = p / p.sum()
    return float(torch.exp(-(p * (p + 1e-10).log()).sum()))


def _rows(z: Tensor) -> Tensor:
    """Latents `(B, Z, d, h, w)` to `(N, Z)` float32."""
    return z.detach().movedim(1, -1).reshape(-1, z.shape[1]).float()


def _random_latents(codebook: Codebook, rows: Tensor, generator: torch.Generator) -> Tensor:
    """As many random latents as there are codes; repeated, with a little noise, where the batch has fewer."""
    codes, channels = codebook.embeddings.shape
    if len(rows) < codes:
        rows = rows.repeat(-(-codes // len(rows)), 1)
        noise = torch.randn(rows.shape, generator=generator).to(rows.device)
        rows = rows + noise * 0.01 / channels**0.5
    order = torch.randperm(len(rows), generator=generator)[:codes]
    chosen = rows[order.to(rows.device)]
    if _is_distributed():
        distributed.broadcast(chosen, 0)
    return chosen


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
