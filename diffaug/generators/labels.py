"""Label maps: from the user's ids to the generator's and to one-hot, and back."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diffaug.errors import LabelError

# More different values than label maps of whole bodies have: an image was given for a label map.
MOST_IDS = 256


def most_likely(scores: Tensor) -> Tensor:
    """The class with the largest score, the first of equals: `(B, L, I, J, K)` to int64 `(B, I, J, K)`.

    Classes last in memory: over dimension 1 argmax took 16 ms for 3 classes of 40 x 56 x 40, so 0.2.
    """
    return scores.movedim(1, -1).contiguous().argmax(dim=-1)


def spread(indices: Tensor, classes: int) -> Tensor:
    """Places in a vocabulary, `(B, 1, I, J, K)`, to one-hot float32 `(B, L, I, J, K)`."""
    places = torch.arange(classes, dtype=indices.dtype, device=indices.device)
    return (indices == places.view(-1, 1, 1, 1)).float()


class CompleteMapping(dict[int, int]):
    """The user's ids to the generator's, of which others than these, and 0, are an error: with a vocabulary
    of a whole body nearly every id that was forgotten is some other structure's."""


class Vocabulary:
    """The label ids a generator knows, background 0 first: `{0: "background", 1: "Anterior", ...}`."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = dict(sorted(names.items()))
        self.ids = list(self.names)

    def __len__(self) -> int:
        return len(self.ids)

    def check_mapping(self, mapping: Mapping[int, int] | None) -> None:
        """Raises LabelError unless `mapping`, the user's ids to the generator's, leads to known ids."""
        if targets := sorted(set((mapping or {}).values()) - self.names.keys()):
            raise LabelError(
                f"label_mapping leads to {targets}, but the generator's vocabulary is {{{self}}}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{k}: {v}" for k, v in self.names.items())

    def indices(self, label: Tensor, mapping: Mapping[int, int] | None = None) -> Tensor:
        """Label map of integer ids to their places in `ids`, background 0: int16, of the same shape.

        `mapping` takes the user's ids to the generator's; ids that it does not name stand for themselves
        (for a `CompleteMapping` they are an error).

        Raises:
            LabelError: for an id that the generator does not know; shows both vocabularies.
        """
        values = (label.float() if label.is_floating_point() else label).cpu().numpy()
        found = np.unique(values)
        if not np.array_equal(found, np.round(found)) or not np.isfinite(found).all():
            raise LabelError("the label map holds values that are not integers: give integer label ids")
        present = [int(value) for value in found]
        self.check_mapping(mapping)
        if isinstance(mapping, CompleteMapping) and (forgotten := set(present) - {0, *mapping}):
            raise LabelError(
                f"the label map holds {sorted(forgotten)}, which the table of labels does not name: add them "
                "(0 leaves a structure out)"
            )
        mapping = dict(mapping or {})
        if unknown := [value for value in present if mapping.get(value, value) not in self.names]:
            if len(present) > MOST_IDS:
                raise LabelError(
                    f"the label map holds {len(present)} different values: is it an image? The generator's "
                    f"vocabulary is {{{self}}}"
                )
            raise LabelError(
                f"label id(s) {unknown} are not in the generator's vocabulary {{{self}}}; the label map "
                f"holds {present}. Say which is which with label_mapping={{your id: generator id}}, for "
                f"example {{{unknown[0]}: {self.ids[-1]}}} (0 is background)"
            )
        indices = np.zeros(values.shape, np.int16)
        for value in present:
            if place := self.ids.index(mapping.get(value, value)):
                indices[values == value] = place
        return torch.from_numpy(indices).to(label.device)

    def from_scores(self, scores: Tensor) -> Tensor:
        """Logits or shares `(B, L, I, J, K)` to the label map `(B, 1, I, J, K)`, int16."""
        ids = torch.tensor(self.ids, dtype=torch.int16, device=scores.device)
        return ids[most_likely(scores)[:, None]]
