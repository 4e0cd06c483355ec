"""Memorisation in one feature space, every figure beside what held-out cases give in the samples' place."""

from collections.abc import Sequence

import numpy as np

from diffaug.audit.features import NamedSearch, Space
from diffaug.audit.record import CopyRecord, Figure, Memorisation, SearchRecord, Suspect
from diffaug.audit.volumes import Sets
from diffaug.evaluation.balance import balance
from diffaug.evaluation.memorisation import (
    Copies,
    authenticity,
    membership_auc,
    memorised_share,
    neighbour_ratios,
)


def measure_memorisation(space: Space, sets: Sets, seed: int = 0) -> Memorisation:
    """All figures of one space but suspected copies, which all spaces search together."""
    training, held_out = sets.training.patients, sets.held_out.patients
    memorised = memorised_share(
        space.synthetic_to_training.T, space.held_out_to_training.T, held_out, seed=seed
    )
    found = balance(
        1 - space.balance_to_training, 1 - space.balance_to_held_out, training, held_out, seed=seed
    )
    own = 1 - space.training_to_training
    queries = {"share": 1 - space.synthetic_to_training, "null": 1 - space.held_out_to_training}
    authentic = {name: float(authenticity(d, own, training).mean()) for name, d in queries.items()}
    ratios = {name: float(np.median(neighbour_ratios(d, training))) for name, d in queries.items()}
    auc = membership_auc(
        1 - space.balance_to_training.T, 1 - space.balance_to_held_out.T, training, held_out, seed=seed
    )
    return Memorisation(
        tau=memorised.threshold,
        memorised_share=memorised.share,
        memorised_null=memorised.null,
        matched=memorised.cases,
        balance=Figure.of(found.share),
        balance_cases=found.cases,
        balance_of_copies=0.5 + 0.5 * found.cases / len(training),
        authentic_share=authentic["share"],
        authentic_null=authentic["null"],
        neighbour_ratio=ratios["share"],
        neighbour_ratio_null=ratios["null"],
        membership_auc=Figure.of(auc),
    )


def record_copies(searches: Sequence[NamedSearch], copies: Copies, sets: Sets) -> CopyRecord:
    """What all searches found, in numbers."""
    nearest = {
        int(column)
        for search, found in zip(searches, copies.searches, strict=True)
        for column in search.similarities.synthetic[found.suspected].argmax(1)
    }
    return CopyRecord(
        copies=int(copies.suspected.sum()),
        clear_copies=int(copies.clearly.sum()),
        training_cases=len(nearest),
        training_patients=len({sets.training.patients[column] for column in nearest}),
        searches=[
            SearchRecord(
                name=search.name,
                title=search.title,
                threshold=found.threshold,
                clear_threshold=found.clear,
                copies=int(found.suspected.sum()),
                clear_copies=int(found.clearly.sum()),
                expected=found.expected,
                most=found.most,
            )
            for search, found in zip(searches, copies.searches, strict=True)
        ],
    )


def list_suspects(searches: Sequence[NamedSearch], copies: Copies, sets: Sets) -> list[Suspect]:
    """Suspected copies of all searches with their training cases, the most alike first.

    Clear copies come first. A case that several searches suspect is listed by one that finds it clear, else
    by the one whose threshold it exceeds most, in units of the distance from there to similarity 1.
    """
    best: dict[int, tuple[tuple[bool, float], Suspect]] = {}
    for search, found in zip(searches, copies.searches, strict=True):
        similarities = search.similarities.synthetic
        for row in np.flatnonzero(found.suspected).tolist():
            column = int(similarities[row].argmax())
            similarity = float(similarities[row, column])
            excess = (similarity - found.threshold) / max(1 - found.threshold, 1e-9)
            rank = bool(found.clearly[row]), excess
            if row not in best or rank > best[row][0]:
                suspect = Suspect(
                    synthetic=sets.synthetic.names[row],
                    training=sets.training.names[column],
                    search=search.name,
                    similarity=similarity,
                    clear=bool(found.clearly[row]),
                )
                best[row] = rank, suspect
    return [suspect for _, suspect in sorted(best.values(), key=lambda entry: entry[0], reverse=True)]
