"""An audit of a leaky dataset that tests of its report, page and cache share."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import diffaug.audit.encoder
import diffaug.audit.fidelity
import diffaug.audit.memorisation
from diffaug.audit.auditing import Options, audit
from diffaug.audit.record import Report
from diffaug.evaluation.balance import balance
from diffaug.evaluation.embedding import fit_embedder
from diffaug.evaluation.memorisation import membership_auc
from tests.audit.world import World, make_world, part

STEPS = 30


class Audited(NamedTuple):
    """A report, and the folder that it was written to."""

    report: Report
    output: Path


def draw_less(patch: pytest.MonkeyPatch) -> None:
    """Intervals of an audit from fewer draws, which take most of its time on small volumes."""
    patch.setattr(diffaug.audit.memorisation, "balance", partial(balance, exchanges=40))
    patch.setattr(diffaug.audit.memorisation, "membership_auc", partial(membership_auc, resamples=200))
    patch.setattr(diffaug.audit.fidelity, "DRAWS", 20)
    patch.setattr(diffaug.audit.fidelity, "HALF_SAMPLES", 40)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the audits of a session keep."""
    return tmp_path_factory.mktemp("cache") / "audit"


@pytest.fixture(scope="session")
def run_audit(
    world: World, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Audited]:
    """A maker of audits of a folder against the world's scans."""

    def run(folder: Path) -> Audited:
        output = tmp_path_factory.mktemp("audits") / folder.name
        with pytest.MonkeyPatch.context() as patch:
            draw_less(patch)
            report = audit(
                part(folder),
                world.training,
                world.held_out,
                output,
                cache=cache,
                options=Options(steps=STEPS),
            )
        return Audited(report, output)

    return run


@pytest.fixture(scope="session")
def leaky(run_audit: Callable[[Path], Audited], world: World) -> Audited:
    return run_audit(world.leaky)


@pytest.fixture
def short_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits that train for a few steps and draw less, however they are started."""
    draw_less(monkeypatch)

    def fit(*arguments: object, steps: int, **more: object) -> object:
        return fit_embedder(*arguments, steps=min(steps, STEPS), **more)  # type: ignore[arg-type]

    monkeypatch.setattr(diffaug.audit.encoder, "fit_embedder", fit)
