"""An embedding in which a case lies beside its altered copies and apart from other patients (Dar et al., arXiv
2402.01054): what a copy detector compares."""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.errors import DiffaugError
from diffaug.evaluation.augmentation import alter
from diffaug.evaluation.statistics import cluster_index
from diffaug.generators.blocks import ResidualBlock, conv1, conv3, space_to_depth
from diffaug.generators.hardware import has_bfloat16

SIZE = 32
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
# Weight of another case that is blended into half of the views, at most: a copy may be hidden that way.
BLEND = 0.3


class Embedder(nn.Module):
    """A convolutional network from standardised volumes `(B, C, I, J, K)` to embeddings `(B, 32)`.

    Blocks of 2 x 2 x 2 voxels become channels before the first layer; the last feature maps are averaged to 4
    x 4 x 4 places, so that the embedding knows where in the volume it saw what.
    """

    def __init__(self, channels: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.features = nn.Sequential(
            conv3(8 * channels, fine),
            nn.Conv3d(fine, middle, kernel_size=2, stride=2),
            ResidualBlock(middle),
            nn.Conv3d(middle, coarse, kernel_size=2, stride=2),
            ResidualBlock(coarse),
            nn.GroupNorm(8, coarse),
            nn.SiLU(),
            conv1(coarse, 16),
        )
        self.head = nn.Sequential(nn.Linear(16 * 4**3, 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, SIZE))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings; I, J and K are multiples of 8."""
        features = self.features(space_to_depth(images, (2, 2, 2)))
        return self.head(F.adaptive_avg_pool3d(features, 4).flatten(1))


def nt_xent(first: Tensor, second: Tensor, patients: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020) with Pearson's correlation for similarity.

    Args:
        first: embeddings of one view of each case `(B, D)`.
        second: embeddings of another view of the same cases.
        patients: number of each case's patient `(B,)`; other scans of a patient are no negatives.
        temperature: that the correlations are divided by.
    """
    count = len(first)
    similarity = correlation(torch.cat([first, second]), torch.cat([first, second])) / temperature
    same = patients.repeat(2)[:, None] == patients.repeat(2)[None, :]
    partner = (torch.arange(2 * count, device=first.device) + count) % (2 * count)
    positive = F.one_hot(partner, 2 * count).bool()
    return F.cross_entropy(similarity.masked_fill(same & ~positive, -math.inf), partner)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the rows of `(N, D)` with those of `(M, D)`: `(N, M)`, float32."""
    a, b = (F.normalize(rows.float() - rows.float().mean(1, keepdim=True), dim=1) for rows in (first, second))
    return a @ b.T


def fit_embedder(
    images: Tensor,
    patients: Sequence[Hashable],
    *,
    steps: int,
    seed: int,
    batch: int = 24,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[int, float], None] | None = None,
) -> Embedder:
    """Train an embedder on real cases: two altered views of a case belong together, those of others apart.

    The same arguments give the same weights to the last bit on one machine with one number of threads.

    Args:
        images: standardised volumes `(N, C, I, J, K)`, float32 or float16; I, J and K are multiples of 8.
        patients: the patient of each.
        steps: gradient steps; the learning rate falls to zero along a cosine.
        seed: of the initial weights, the order of the cases and the views.
        batch: cases of a step.
        learning_rate: the largest one, of AdamW.
        on_step: called with the step, from 1, and its loss.

    Raises:
        DiffaugError: fewer than two patients, or sizes that are not multiples of 8.
    """
    numbers = torch.from_numpy(cluster_index(patients))
    if len(numbers) != len(images) or int(numbers.max()) < 1:
        raise DiffaugError(f"{len(images)} volumes of {len(set(patients))} patients: two patients at least")
    if any(size % 8 for size in images.shape[2:]):
        raise DiffaugError(f"volumes of {tuple(images.shape[2:])} voxels: pad each side to a multiple of 8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Embedder(images.shape[1]).to(images.device).train()
        random = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
        queue: list[int] = []
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            while len(queue) < batch:
                queue += torch.randperm(len(images), generator=random).tolist()
            chosen, queue = queue[:batch], queue[batch:]
            cases = images[chosen].float()
            first, second = (_embed(model, view(cases, random)) for _ in range(2))
            loss = nt_xent(first, second, numbers[chosen].to(images.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if on_step is not None:
                on_step(step + 1, loss.item())
    return model.eval().requires_grad_(False)


def view(images: Tensor, random: torch.Generator) -> Tensor:
    """Altered copies of a batch: turned, scaled, shifted, bent, mirrored along any axis, with other contrast,
    noise and blur, and half of them blended with another case of the batch."""
    axis = int(torch.randint(3, (1,), generator=random))
    altered = alter(images, axis, random)
    weights = BLEND * torch.rand(len(images), generator=random)
    weights *= torch.rand(len(images), generator=random) < 0.5
    weights = weights.view(-1, 1, 1, 1, 1).to(images.device)
    return torch.lerp(altered, altered.roll(1, 0), weights)


@torch.no_grad()
def embed(model: Embedder, images: Tensor, batch: int = 16) -> Tensor:
    """Embeddings `(N, 32)`, float32, of standardised volumes `(N, C, I, J, K)`."""
    return torch.cat([_embed(model, part.float()) for part in images.split(batch)])


def _embed(model: Embedder, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16(images.device)):
        return model(images).float()
