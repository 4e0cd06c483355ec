"""An audit from its three datasets to its report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffaug.audit.detector import FILE as DETECTOR
from diffaug.audit.detector import write_detector
from diffaug.audit.encoder import STEPS, trained_encoder
from diffaug.audit.features import (
    encoder_space,
    intensity_space,
    matrix_space,
    network_space,
    read_features,
    twins,
)
from diffaug.audit.fidelity import Comparison, compare_features, compare_measures, compare_pairs
from diffaug.audit.memorisation import list_suspects, measure_memorisation, record_copies
from diffaug.audit.networks import check_channels, load_network
from diffaug.audit.page import write_page
from diffaug.audit.record import (
    Beside,
    CopyRecord,
    Figure,
    PairSimilarity,
    Report,
    SetRecord,
    SpaceReport,
    Utility,
    Verdict,
)
from diffaug.audit.utility import check_labels, measure_utility
from diffaug.audit.verdicts import (
    balance_verdict,
    copy_verdict,
    diversity_verdict,
    fidelity_verdict,
    label_verdict,
    membership_verdict,
)
from diffaug.audit.volumes import CaseSet, Sets, audit_grid, collect
from diffaug.datasets.manifest import MANIFEST, read_manifest
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DatasetError, DiffaugError
from diffaug.evaluation.memorisation import find_copies
from diffaug.files import PRIVATE, atomic_write_text
from diffaug.generators.card import CardGrid
from diffaug.generators.grid import Grid
from diffaug.generators.hardware import check_device
from diffaug.progress import Progress
from diffaug.version import __version__

# Patients of a set without which there are no intervals, and synthetic cases without which there is no
# figure.
FEWEST_PATIENTS, FEWEST_CASES = 8, 16
_README = """Stays with you: these files hold scans, and an encoder that was trained on them. The next audit
against the same scans reads them again.
"""


@dataclass(frozen=True)
class Part:
    """Cases of a dataset that play one role in an audit."""

    dataset: Dataset
    cases: Sequence[CaseFiles]

    @classmethod
    def whole(cls, folder: Path) -> "Part":
        """All cases of the dataset in a folder."""
        dataset = read_dataset(folder)
        return cls(dataset, dataset.cases)


@dataclass(frozen=True)
class Options:
    """What an audit may be told.

    Attributes:
        features: CSV with features of all cases, for a space of the user's own.
        network: name of a MONAI network, and its weights.
        utility: whether segmenters are trained, which takes minutes.
        steps: gradient steps of the encoder.
        device: such as "cpu" or "cuda".
        notes: sentences about the sets that the report repeats.
    """

    features: Path | None = None
    network: tuple[str, Path] | None = None
    utility: bool = False
    steps: int = STEPS
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)


def audit(
    synthetic: Part,
    training: Part,
    held_out: Part,
    output: Path,
    *,
    cache: Path | None = None,
    detector: Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare synthetic cases with those that trained their generator and with others.

    Writes `report.html`, which explains itself, and `report.json`; the page shows training scans beside what
    resembles them. Cases are compared on one grid, that of the generator, as standardised volumes.

    Args:
        synthetic: what was made, at least 16 cases.
        training: what the generator was trained on; of at least 8 patients.
        held_out: real cases of other patients, at least 8, that the generator never saw.
        output: folder of the report.
        cache: folder of volumes and of the encoder, which the next audit reads again; default: `private` in
            the output. It holds scans.
        detector: file of the copy detector, by which a build can reject copies; default: in `private`.
        options: everything else.
        progress: where to show it; default: nowhere.

    Raises:
        DatasetError, DiffaugError: a set is too small or a file cannot be used, or a patient or a scan is in
            two sets; no report has been written then.
    """
    options, progress = options or Options(), progress or Progress(quiet=True)
    cache = cache or output / PRIVATE
    check_device(options.device)
    notes = _check(synthetic, training, held_out)
    if options.utility:
        check_labels(*((part.dataset, part.cases) for part in (synthetic, training, held_out)))
    if options.features is not None:
        read_features(
            options.features, [c.name for part in (synthetic, training, held_out) for c in part.cases]
        )
    network = load_network(*options.network) if options.network else None
    if network is not None and options.network is not None:
        check_channels(network, len(synthetic.dataset.channels), options.network[1])
    grid = audit_grid(synthetic.dataset)
    atomic_write_text(cache / "README.txt", _README)
    parts = {"synthetic": synthetic, "training": training, "held-out": held_out}
    sets = Sets(
        *(
            collect(part.dataset, part.cases, grid, cache, progress, f"{name} cases")
            for name, part in parts.items()
        )
    )
    _check_apart(sets)
    encoder = trained_encoder(sets.training, cache, options.steps, options.device, progress)
    balanced = trained_encoder(
        sets.training, cache, options.steps, options.device, progress, held_out=sets.held_out
    )
    spaces = [encoder_space(encoder, balanced, sets, progress)]
    spaces.append(intensity_space(sets, spaces[0].searches, progress))
    if network is not None and options.network is not None:
        spaces.append(network_space(options.network[0], network.to(options.device), sets, progress))
    if options.features is not None:
        spaces.append(matrix_space(options.features, sets))

    labels = [name for name in sets.synthetic.label_volumes if all(_labelled(s, name) for s in sets)]
    if not labels:
        notes.append("Label volumes were not compared: the sets have no label of one name, or no label maps.")
    space_reports = []
    with progress.task("figures", total=len(spaces)) as task:
        for space in spaces:
            distributions = compare_features(space.synthetic, space.training, space.held_out, sets)
            space_reports.append(
                SpaceReport(
                    name=space.name,
                    title=space.title,
                    memorisation=measure_memorisation(space, sets),
                    distributions={name: _beside(c) for name, c in distributions.items()},
                )
            )
            task.advance()
    searches = [search for space in spaces for search in space.searches]
    copies = find_copies([search.similarities for search in searches], sets.held_out.patients)
    copy_record = record_copies(searches, copies, sets)
    measures = {name: _beside(c) for name, c in compare_measures(sets, labels).items()}
    pairs = compare_pairs(sets, progress)
    similarity = PairSimilarity(
        ms_ssim=Beside(synthetic=Figure.of(pairs.synthetic), real=Figure.of(pairs.real)),
        scales=pairs.scales,
        kernel=pairs.kernel,
        pairs=pairs.pairs,
    )
    report = Report(
        version=__version__,
        synthetic=_record(synthetic, sets.synthetic),
        training=_record(training, sets.training),
        held_out=_record(held_out, sets.held_out),
        grid=CardGrid.of(grid),
        encoder=f"{options.steps} steps of NT-Xent on {len(sets.training)} training cases; for balance and "
        "membership on the held-out ones, too",
        verdicts=_verdicts(copy_record, space_reports, measures, similarity, len(sets.synthetic)),
        copies=copy_record,
        spaces=space_reports,
        measures=measures,
        similarity=similarity,
        suspects=list_suspects(searches, copies, sets),
        utility=_utility(parts.values(), grid, output, options.device, progress) if options.utility else None,
        notes=[*notes, *options.notes],
    )
    write_detector(encoder, spaces[0], sets, grid, detector or output / PRIVATE / DETECTOR)
    write_page(report, spaces, sets, labels, output / "report.html")
    atomic_write_text(output / "report.json", report.model_dump_json(indent=2) + "\n")
    return report


def _utility(parts: Iterable[Part], grid: Grid, output: Path, device: str, progress: Progress) -> Utility:
    synthetic, training, held_out = ((part.dataset, part.cases) for part in parts)
    segmenter = output / PRIVATE / "segmenter.safetensors"
    return measure_utility(synthetic, training, held_out, grid, segmenter, progress, device=device)


def _verdicts(
    copies: CopyRecord,
    spaces: Sequence[SpaceReport],
    measures: dict[str, Beside],
    similarity: PairSimilarity,
    samples: int,
) -> list[Verdict]:
    memorisation = [(space.title, space.memorisation) for space in spaces]
    found = [
        copy_verdict(copies, samples),
        balance_verdict(memorisation),
        membership_verdict(memorisation),
        fidelity_verdict(spaces, measures),
        diversity_verdict(spaces, similarity),
        label_verdict(measures),
    ]
    return [verdict for verdict in found if verdict is not None]


def _check(synthetic: Part, training: Part, held_out: Part) -> list[str]:
    """Refuse sets that say nothing; notes on what weakens the audit."""
    if len(synthetic.cases) < FEWEST_CASES:
        raise DiffaugError(
            f"{synthetic.dataset.root} has {len(synthetic.cases)} synthetic cases: an audit needs at least "
            f"{FEWEST_CASES}, better 200"
        )
    notes = []
    for part, role in ((synthetic, "synthetic"), (training, "training"), (held_out, "held-out")):
        patients = {case.patient for case in part.cases}
        if len(patients) < FEWEST_PATIENTS:
            raise DiffaugError(
                f"{part.dataset.root} has {len(part.cases)} {role} cases of {len(patients)} patients: an "
                f"audit needs at least {FEWEST_PATIENTS} patients, better 40"
            )
        if part is not synthetic and not part.dataset.patients_given:
            notes.append(f"No patient table was given for the {role} cases: each was taken for a patient.")
    manifest = synthetic.dataset.root / MANIFEST
    if manifest.is_file() and read_manifest(manifest).settings.inspection is not None:
        notes.append(
            "Candidates that resembled a training scan were refused while this dataset was built, by a "
            "detector of the kind that looks for copies here: that it finds few says little about the "
            "generator."
        )
    both = {case.patient for case in training.cases} & {case.patient for case in held_out.cases}
    named = training.dataset.patients_given == held_out.dataset.patients_given
    if both and named:
        raise DatasetError(
            [
                f"{len(both)} patients are among the training and the held-out cases, such as "
                f"{sorted(both)[0]}: held-out cases must be of others (is it another patient by the same "
                "name? Rename one)"
            ]
        )
    channels = {len(part.dataset.channels) for part in (synthetic, training, held_out)}
    if len(channels) > 1:
        raise DiffaugError(
            f"the datasets have {sorted(channels)} channels: only equal numbers can be compared"
        )
    return notes


def _check_apart(sets: Sets) -> None:
    """Refuse a training scan among the held-out ones: nothing would be more alike than these."""
    same = twins(sets)
    if same:
        listed = "; ".join(f"{held_out} is {training}" for held_out, training in same[:5])
        raise DatasetError(
            [
                f"{len(same)} held-out scans are training scans, too ({listed}): take them out of one of the "
                "sets"
            ]
        )


def _labelled(cases: CaseSet, name: str) -> bool:
    return name in cases.label_volumes and bool(np.isfinite(cases.label_volumes[name]).any())


def _beside(comparison: Comparison) -> Beside:
    return Beside(synthetic=Figure.of(comparison.synthetic), real=Figure.of(comparison.real))


def _record(part: Part, cases: CaseSet) -> SetRecord:
    return SetRecord(
        name=part.dataset.name,
        cases=len(cases),
        patients=len(set(cases.patients)) if part.dataset.patients_given else None,
        licence=part.dataset.licence,
        files=cases.files,
    )
