"""The audit that a fit ends with: samples of the new generator, beside its training and held-out cases."""

from pathlib import Path

from diffaug.audit.auditing import FEWEST_PATIENTS, Options, Part, audit
from diffaug.audit.carding import put_on_card
from diffaug.audit.detector import FILE
from diffaug.datasets.building import build_dataset
from diffaug.datasets.reading import Dataset
from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.progress import Progress
from diffaug.training.subsets import Subsets

SAMPLES = 100


def closing_audit(
    output: Path, dataset: Dataset, subsets: Subsets, private: Path, device: str, progress: Progress
) -> None:
    """Audit the finished generator in `output` and put the verdicts on its card.

    Samples, report and everything else that shows or holds scans go to `private`. Where there are too few
    patients it says so, and the card stays without an audit.
    """
    if Generator.load(output).card.extent == "patch":
        progress.note(
            "No audit: samples of a generator of patches cannot be compared with whole scans. Look at what "
            "it makes before you share it."
        )
        return
    names = {case.name for case in subsets.train}
    known = None if dataset.split is None else {name for part in dataset.split.values() for name in part}
    held_out = [
        case for case in dataset.cases if case.name not in names and (known is None or case.name in known)
    ]
    for cases, role in ((subsets.train, "training"), (held_out, "held-out")):
        patients = len({case.patient for case in cases})
        if patients < FEWEST_PATIENTS:
            progress.note(
                f"No audit: it needs {FEWEST_PATIENTS} {role} patients, and there are {patients}. Run "
                "diffaug audit with scans of other patients before you share what this generator makes."
            )
            return
    notes = []
    if Generator.load(output).card.training.init is not None:
        notes.append(
            "The generator started from another one, whose training scans are not among these: what it may "
            "have copied of them was not looked for, and they must not be among the held-out scans."
        )
    samples = private / "audit" / "samples"
    generator = Generator.load(output).to(device)
    try:
        build_dataset(generator, samples, cases=SAMPLES, layout="decathlon", progress=progress)
        report = audit(
            Part.whole(samples),
            Part(dataset, list(subsets.train)),
            Part(dataset, held_out),
            private / "audit",
            cache=private / "audit" / "cache",
            detector=private / FILE,
            options=Options(device=device, notes=notes),
            progress=progress,
        )
    except DiffaugError as error:
        # The fit itself is finished. One that learned nothing makes samples without any structure.
        progress.note(f"No audit: {error}")
        return
    put_on_card(output, samples, report)
    for verdict in report.verdicts:
        progress.note(f"{verdict.answer:7} {verdict.question} {verdict.found}")
    progress.note(f"audit: {report.answer}; {private / 'audit' / 'report.html'}")
