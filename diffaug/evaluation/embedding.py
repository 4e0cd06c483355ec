"""An embedding in which a case lies beside its altered copies and apart from other patients.

It is what a copy detector compares (Dar et al., arXiv 2402.01054).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations, product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.errors import DiffaugError
from diffaug.evaluation.alignment import correlations
from diffaug.evaluation.augmentation import augment
from diffaug.evaluation.statistics import cluster_index
from diffaug.files import atomic_path
from diffaug.generators.blocks import conv1, conv3, space_to_depth
from diffaug.generators.hardware import has_bfloat16

SIZE = 64
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
# Weight of another case that is blended into half of the views, at most: a copy may be hidden that way.
BLEND = 0.3
# Voxels that half of the views are rolled by, at most, beyond what `alter` shifts them.
ROLL = 4
# Steps after which a training is kept.
CHECKPOINT_EVERY = 100
# Sides of a volume are multiples of this.
MULTIPLE = 8
# Axes of `(B, C, I, J, K)` along which each mirror image is flipped: one, two or three of them.
MIRRORED = [axes for count in (1, 2, 3) for axes in combinations((2, 3, 4), count)]
# Voxels that a case is rolled by: not at all, and towards the eight corners.
SHIFTED = [(0, 0, 0), *product((-2, 2), repeat=3)]


class Embedder(nn.Module):
    """A convolutional network from standardised volumes `(B, C, I, J, K)` to embeddings `(B, 64)`.

    Blocks of 2 x 2 x 2 voxels become channels before the first layer. The last feature maps are averaged to 4
    x 4 x 4 places, so that the embedding knows where in the volume it saw what, and over the whole volume,
    which a shift does not change. Batch norms, the last one of the embedding itself, take away what all cases
    share: without them 400 steps learned nothing.
    """

    def __init__(self, channels: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.channels = channels
        self.features = nn.Sequential(
            *_normed(conv3(8 * channels, fine), fine),
            *_normed(nn.Conv3d(fine, middle, kernel_size=2, stride=2), middle),
            *_normed(conv3(middle, middle), middle),
            *_normed(nn.Conv3d(middle, coarse, kernel_size=2, stride=2), coarse),
            *_normed(conv3(coarse, coarse), coarse),
        )
        self.places = conv1(coarse, 16)
        self.whole = nn.Sequential(*_normed(conv3(coarse, 2 * coarse), 2 * coarse))
        self.head = nn.Sequential(
            nn.Linear(16 * 4**3 + 4 * coarse, 256),
            nn.BatchNorm1d(256),
            nn.SiLU(),
            nn.Linear(256, SIZE),
            nn.BatchNorm1d(SIZE, affine=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings; I, J and K are multiples of 8."""
        features = self.features(space_to_depth(images, (2, 2, 2)))
        places = F.adaptive_avg_pool3d(self.places(features), 4).flatten(1)
        whole = self.whole(features)
        return self.head(torch.cat([places, whole.mean((2, 3, 4)), whole.amax((2, 3, 4))], 1))


def _normed(convolution: nn.Module, channels: int) -> list[nn.Module]:
    return [convolution, nn.BatchNorm3d(channels), nn.SiLU()]


def nt_xent(first: Tensor, second: Tensor, patients: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020) of Pearson's correlations.

    Args:
        first: embeddings of one view of each case `(B, D)`.
        second: embeddings of another view of the same cases.
        patients: number of each case's patient `(B,)`; other scans of a patient are no negatives.
        temperature: that the correlations are divided by.
    """
    count = len(first)
    both = torch.cat([first, second])
    similarity = correlations(both, both) / temperature
    same = patients.repeat(2)[:, None] == patients.repeat(2)[None, :]
    partner = (torch.arange(2 * count, device=first.device) + count) % (2 * count)
    positive = F.one_hot(partner, 2 * count).bool()
    return F.cross_entropy(similarity.masked_fill(same & ~positive, -math.inf), partner)


def fit_embedder(
    cases: Callable[[Sequence[int]], Tensor],
    patients: Sequence[Hashable],
    *,
    steps: int,
    seed: int,
    batch: int = 24,
    learning_rate: float = LEARNING_RATE,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Embedder:
    """Train an embedder on real cases: two altered views of a case belong together, those of others apart.

    The same arguments give the same weights to the last bit on one machine with one number of threads.

    Args:
        cases: indices to standardised volumes `(B, C, I, J, K)`, float32; I, J and K are multiples of 8.
        patients: the patient of each case.
        steps: gradient steps; the learning rate falls to zero along a cosine.
        seed: of the initial weights, the order of the cases and the views.
        batch: cases of a step.
        learning_rate: the largest one, of AdamW.
        checkpoint: file that a stopped training goes on from, with the same bytes in the end; written every
            100 steps, and gone when the training has ended.
        on_step: called with the step, from 1, and its loss.

    Returns:
        The embedder in evaluation mode, on the device of the volumes.

    Raises:
        DiffaugError: fewer than two patients, or sizes that are not multiples of 8.
    """
    numbers = torch.from_numpy(cluster_index(patients))
    if len(numbers) < 2 or int(numbers.max()) < 1:
        raise DiffaugError(f"{len(numbers)} cases of {len(set(patients))} patient: two patients are needed")
    example = cases([0])
    if any(size % MULTIPLE for size in example.shape[2:]):
        raise DiffaugError(f"volumes of {tuple(example.shape[2:])} voxels: pad each side to a multiple of 8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Embedder(example.shape[1]).to(example.device).train()
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
    queue: list[int] = []
    done = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=example.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        random.set_state(state["random"].cpu())
        queue, done = state["queue"], state["steps"]
    for step in range(done, steps):
        optimiser.param_groups[0]["lr"] = learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        while len(queue) < batch:
            queue += torch.randperm(len(numbers), generator=random).tolist()
        chosen, queue = queue[:batch], queue[batch:]
        volumes = cases(chosen)
        first, second = (_embed(model, view(volumes, random)) for _ in range(2))
        loss = nt_xent(first, second, numbers[chosen].to(volumes.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
        if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0:
            with atomic_path(checkpoint) as temporary:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "random": random.get_state(),
                        "queue": queue,
                        "steps": step + 1,
                    },
                    temporary,
                )
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return model.eval().requires_grad_(False)


def view(images: Tensor, random: torch.Generator) -> Tensor:
    """Altered copies of a batch: turned, scaled, shifted, bent, with other contrast, noise and blur; half of
    them rolled, half of them blended with another case of the batch. They are not mirrored: `embed_mirrored`
    makes up for that."""
    no_labels = torch.zeros_like(images[:, :1], dtype=torch.int16)
    altered, _ = augment(images, no_labels, 2, None, random)
    amounts = torch.randint(-ROLL, ROLL + 1, (len(images), 3), generator=random)
    amounts *= torch.rand((len(images), 1), generator=random) < 0.5
    pairs = zip(altered, amounts.tolist(), strict=True)
    altered = torch.stack([torch.roll(image, amount, (1, 2, 3)) for image, amount in pairs])
    weights = BLEND * torch.rand(len(images), generator=random)
    weights *= torch.rand(len(images), generator=random) < 0.5
    return torch.lerp(altered, altered.roll(1, 0), weights.view(-1, 1, 1, 1, 1).to(images.device))


@torch.no_grad()
def embed(model: Embedder, images: Tensor) -> Tensor:
    """Embeddings `(B, 64)`, float32, of standardised volumes `(B, C, I, J, K)`."""
    return _embed(model, images)


def embed_shifted(model: Embedder, images: Tensor) -> Tensor:
    """Embeddings `(B, 9, 64)` of the volumes and of shifted ones."""
    return torch.stack([embed(model, images.roll(shift, (2, 3, 4))) for shift in SHIFTED], 1)


def embed_mirrored(model: Embedder, images: Tensor) -> Tensor:
    """Embeddings `(B, 7, 64)` of the volumes' mirror images."""
    return torch.stack([embed(model, images.flip(axes)) for axes in MIRRORED], 1)


def _embed(model: Embedder, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16(images.device)):
        return model(images).float()
