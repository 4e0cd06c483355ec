"""Candidates of a build that are looked at before they become cases."""

from collections.abc import Callable, Sequence
from typing import Protocol

from diffaug.datasets.manifest import InspectionRecord, Rejected
from diffaug.datasets.writing import Made
from diffaug.errors import DiffaugError
from diffaug.generators.seeds import case_seed

# Candidates for one case, of which the last must be good.
MOST_CANDIDATES = 20


class Inspector(Protocol):
    """Whoever says which candidates are refused."""

    @property
    def record(self) -> InspectionRecord:
        """What decides its judgement, for the manifest."""

    def refuse(self, candidates: Sequence[Made]) -> list[list[str]]:
        """The reasons against each candidate, by the names of the record's checks; none for a good one."""


def candidate_seed(root: int, index: int, attempt: int) -> int:
    """Seed of a candidate for case `index`: that of the case itself, then ones derived from it."""
    seed = case_seed(root, index)
    return case_seed(seed, attempt) if attempt else seed


class Accepted:
    """Good cases of a batch, with the candidates refused before them.

    Attributes:
        made: the cases.
        seeds: theirs.
        rejected: refused candidates of each case.
        hopeless: cases all of whose candidates were refused.
    """

    def __init__(
        self,
        batch: Sequence[int],
        root: int,
        make: Callable[[Sequence[int], Sequence[int]], list[Made]],
        inspector: Inspector | None,
    ) -> None:
        self.made: dict[int, Made] = {}
        self.seeds: dict[int, int] = {}
        self.rejected: dict[int, list[Rejected]] = {index: [] for index in batch}
        self.hopeless: list[int] = []
        waiting = list(batch)
        for attempt in range(MOST_CANDIDATES):
            seeds = [candidate_seed(root, index, attempt) for index in waiting]
            candidates = make(waiting, seeds)
            reasons = inspector.refuse(candidates) if inspector else [[] for _ in candidates]
            refused = []
            for index, seed, candidate, against in zip(waiting, seeds, candidates, reasons, strict=True):
                if against:
                    self.rejected[index].append(Rejected(seed=seed, reasons=against))
                    refused.append(index)
                else:
                    self.made[index], self.seeds[index] = candidate, seed
            waiting = refused
            if not waiting:
                return
        self.hopeless = waiting

    def check(self) -> None:
        """Raise a DiffaugError where a case has no good candidate."""
        if self.hopeless:
            index = self.hopeless[0]
            raise DiffaugError(
                f"all {MOST_CANDIDATES} candidates for case {index} were rejected (the last one: "
                f"{'; '.join(self.rejected[index][-1].reasons)}). What was made is kept, but these settings "
                "lead here again: build with another --seed in another folder, and see what diffaug audit "
                "says of a build without --reject-copies"
            )
