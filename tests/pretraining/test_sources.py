"""Where cases come from: each draw the same whenever it is asked for, in the shares that were given."""

import numpy as np
import torch

from diffaug.generators.generator import Generator
from diffaug.pretraining.sources import BLOCK, Mixed, Streamed, held_out_patients
from diffaug.segmentation.cases import Prepared, Space
from diffaug.segmentation.patches import Listed
from tests.segmentation.test_cases import blobs

SPACE = Space(spacing=(1.5, 1.5, 1.5), patch=(16, 24, 16))


def named(count: int, prefix: str = "case") -> list[Prepared]:
    """Cases of two scans a patient."""
    case, _ = blobs((16, 16, 16), np.eye(4))
    return [
        Prepared(f"{prefix} {n}", f"{prefix} {n // 2}", case.image, case.label, case.placement)
        for n in range(count)
    ]


def stream(generator: Generator, seed: int = 0) -> Streamed:
    return Streamed(generator, SPACE, {0: 0, 1: 1, 2: 2}, seed, reuse=2)


def test_a_stream_gives_each_sample_as_often_as_asked(tiny_generator: Generator) -> None:
    source = stream(tiny_generator)
    names = [source.case(draw).name for draw in range(2 * BLOCK)]
    assert sorted(names) == sorted([f"sample {n}" for n in range(BLOCK)] * 2)
    following = source.case(2 * BLOCK).name
    assert int(following.split()[1]) >= BLOCK


def test_draws_of_a_stream_do_not_depend_on_those_before(tiny_generator: Generator) -> None:
    one, other = stream(tiny_generator), stream(tiny_generator)
    wanted = one.case(70)
    other.case(3)
    found = other.case(70)
    assert found.name == wanted.name
    assert torch.equal(found.image, wanted.image)
    assert not torch.equal(stream(tiny_generator, seed=1).case(70).image, wanted.image)


def test_mixtures_keep_their_shares() -> None:
    sources = [Listed(named(5, "real"), 0), Listed(named(7, "made"), 0)]
    mixed = Mixed(sources, [0.25, 0.75], seed=3)
    names = [mixed.case(draw).name for draw in range(2000)]
    assert np.mean([name.startswith("real") for name in names]) == 0.25
    # Each source's cases come once before any comes again.
    assert {names.count(f"real {n}") for n in range(5)} == {100}
    assert len(set(names)) == 12
    assert Mixed(sources, [0.25, 0.75], seed=3).case(1234).name == names[1234]


def test_a_stream_in_a_mixture_is_drawn_as_often_as_asked(tiny_generator: Generator) -> None:
    """A tenth of 1000 draws: 64 of a first block of 32 samples, 36 of the second."""
    mixed = Mixed([Listed(named(5), 0), stream(tiny_generator)], [0.9, 0.1], seed=0)
    names = [name for draw in range(1000) if (name := mixed.case(draw).name).startswith("sample")]
    assert len(names) == 100
    assert 32 < len(set(names)) <= 2 * BLOCK


def test_patients_are_held_out_whole_and_in_all_sources() -> None:
    held = held_out_patients([*named(40), *named(40)], 0.1, seed=0)
    assert len(held) == 2
    assert held_out_patients(named(2), 0.1, seed=0) == set()
    assert len(held_out_patients(named(4), 0.1, seed=0)) == 1


def test_labelled_cases_stay_to_train_on() -> None:
    case = named(1)[0]
    mostly = [*named(20, "plain")]
    mostly = [Prepared(c.name, c.patient, c.image, None, c.placement) for c in mostly]
    held = held_out_patients([case, *mostly], 0.1, seed=0)
    assert case.patient not in held
    assert len(held) == 1
