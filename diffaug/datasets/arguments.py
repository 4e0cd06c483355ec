"""What a build is asked for: checked, and its defaults filled in, before anything is looked at on disk."""

from collections.abc import Mapping
from pathlib import Path

from diffaug.datasets.layouts import LAYOUTS, LayoutName
from diffaug.datasets.manifest import Parameters, Verb
from diffaug.datasets.volumes import LARGEST_LABEL
from diffaug.errors import DiffaugError, LabelError, VerbError
from diffaug.generators.generator import Generator


def fill_parameters(
    generator: Generator,
    verb: Verb,
    *,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    strength: float | None,
    allow_label_drift: bool,
    told: Mapping[str, float | str] | None = None,
) -> Parameters:
    """The parameters with the card's defaults for what is None.

    Raises:
        DiffaugError: one of them is out of range, or means nothing to the verb or the architecture.
    """
    if strength is not None and verb != "vary":
        raise DiffaugError(f"strength={strength} means nothing to {verb!r}: leave it out, or choose vary")
    if verb == "vary" and strength is None:
        strength = generator.card.defaults.strength
    if strength is not None and not 0 <= strength <= 1:
        raise DiffaugError(f"strength must lie in [0, 1], got {strength}")
    card = generator.card
    sampling = card.sampling(verb, steps, guidance, sampler, told)
    return Parameters(
        sampler=sampling.sampler,
        shift=sampling.shift,
        steps=sampling.steps,
        guidance=sampling.guidance,
        strength=strength,
        allow_label_drift=allow_label_drift,
        told={name: each.default for name, each in card.parameters.items()} | dict(told or {}),
    )


def check_arguments(
    generator: Generator,
    verb: Verb,
    *,
    cases: int,
    source: Path | str | None,
    layout: LayoutName,
    seed: int,
    label_mapping: Mapping[int, int] | None,
    allow_label_drift: bool,
    batch_size: int,
    inspected: bool = False,
) -> None:
    """Raise DiffaugError for arguments of `build_dataset` that are out of range or contradict each other."""
    for name, value, least in (("cases", cases, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise DiffaugError(f"{name} must be at least {least}, got {value}")
    if verb not in ("sample", "paint", "vary"):
        raise VerbError(f"a dataset is built by sample, paint or vary, not by {verb!r}")
    if verb not in generator.verbs:
        raise VerbError(f"{generator.name} has no verb {verb!r}; it has {', '.join(sorted(generator.verbs))}")
    if layout not in LAYOUTS:
        raise DiffaugError(f"layout must be {' or '.join(LAYOUTS)}, got {layout!r}")
    if verb == "sample" and (source is not None or label_mapping):
        raise DiffaugError(
            "sample makes cases from nothing: leave out source and label_mapping, or choose paint or vary"
        )
    if verb == "vary" and inspected:
        raise DiffaugError(
            "vary makes cases that resemble their sources, as it should: leave inspector out "
            "(--reject-copies), or choose sample or paint"
        )
    _check_labels(generator, verb, label_mapping, allow_label_drift)
    if verb != "sample" and source is None:
        wanted = "folder of label maps" if verb == "paint" else "dataset of labelled cases"
        raise DiffaugError(f"{verb} needs a {wanted}: give it as source")


def _check_labels(
    generator: Generator, verb: Verb, label_mapping: Mapping[int, int] | None, allow_label_drift: bool
) -> None:
    """A label is only called preserved where that is enforced, and only called drifting where it is not."""
    if allow_label_drift and verb != "vary":
        raise LabelError(f"allow_label_drift means nothing to {verb!r}: leave it out, or choose vary")
    if allow_label_drift and generator.knows_labels:
        raise LabelError(
            f"what {generator.name} varies follows its label map, which cannot drift: leave "
            "allow_label_drift out"
        )
    if verb == "vary" and not generator.knows_labels and not allow_label_drift:
        raise LabelError(
            f"{generator.name} knows no labels and cannot keep those of the source true: vary with a "
            "generator that knows them, or pass allow_label_drift=True (--allow-label-drift) for copies of "
            "the label maps beside images whose anatomy may have moved"
        )
    if label_mapping and not generator.knows_labels:
        raise LabelError(
            f"label_mapping leads to a generator's label ids, and {generator.name} has none: leave it out"
        )
    wrong = [old for old in label_mapping or {} if not 0 <= old <= LARGEST_LABEL]
    if wrong:
        raise LabelError(f"label_mapping names the ids {wrong}: label ids lie between 0 and {LARGEST_LABEL}")
