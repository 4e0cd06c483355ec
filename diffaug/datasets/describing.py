"""What a built dataset says of itself, in words."""

from diffaug.datasets.manifest import Manifest, Settings

MONTAGE = "montage.png"
# What the answer of a generator's audit means for its samples; None is no audit.
AUDITS = {
    "pass": "no question failed",
    "unclear": "no question failed, some had no clear answer",
    "fail": "failed; see the generator's card",
    None: "none; whether it copies its training scans is unknown",
}
README = "README.md"


def sentence(settings: Settings) -> str:
    """What the dataset is."""
    how = {
        "sample": "images and label maps sampled" if settings.labels else "images sampled",
        "paint": "images painted for the label maps of {source}",
        "vary": "variations of the cases of {source}",
    }[settings.verb].format(source=settings.source.name if settings.source else "")
    return f"Synthetic: {how} by the generator {settings.generator.name} (diffaug)"


def caveat(settings: Settings) -> str:
    """What the label maps are not; empty where the images show them."""
    if settings.parameters.allow_label_drift:
        return "Label maps were copied from the source unchanged: the anatomy in the images may have moved"
    if not settings.labels:
        return "There are no label maps: the generator knows no labels"
    return ""


def readme(header: Manifest) -> str:
    """The dataset's README, in Markdown."""
    settings = header.settings
    parameters, origin = settings.parameters, settings.source
    command = [
        "diffaug build",
        settings.generator.name,
        f"--cases {settings.cases}",
        f"--verb {settings.verb}",
    ]
    if origin:
        command.append(f"--source FOLDER_OF_{origin.name.upper().replace(' ', '_')}")
    command += [f"--layout {settings.layout}", f"--seed {settings.seed}"]
    command += [f"--sampler {parameters.sampler}", f"--steps {parameters.steps}"]
    if settings.generator.labels:
        command.append(f"--guidance {parameters.guidance:g}")
    if parameters.strength is not None:
        command.append(f"--strength {parameters.strength:g}")
    if settings.inspection is not None:
        command.append("--reject-copies --detector DETECTOR")
        if settings.inspection.segmenter is not None:
            command.append("--segmenter SEGMENTER")
    if parameters.allow_label_drift:
        command.append("--allow-label-drift")
    command += [f"--parameter {name}={value}" for name, value in parameters.told.items()]
    command += [f"--label-mapping {old}={new}" for old, new in settings.label_mapping.items()]
    command.append(f"--output {settings.name}")
    renumbered = ", ".join(f"{new} -> {old}" for new, old in header.label_ids.items() if new != old)
    theirs = "source" if parameters.allow_label_drift else "generator"
    made = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    lines = [
        f"# {settings.name}",
        "",
        f"{sentence(settings)}. {settings.cases} cases, whose images a model made.",
        "",
        *([f"**{caveat(settings)}.**", _advice(settings), ""] if caveat(settings) else []),
        "Train with them, do not validate on them: a figure measured on synthetic cases says little about",
        "real ones.",
    ]
    if origin:
        lines += [
            "Each case was made from a real one, which `manifest.json` names under `source`, with",
            "hashes of its files: keep it out of the training of a network that is validated or tested on",
            "that patient, and ask whoever owns the source before you share the dataset.",
        ]
    lines += [
        "",
        f"- Licence: {header.licence}{_terms(header)}",
        f"- Generator: {settings.generator.name}, weights {settings.generator.weights}",
        f"- Audit of the generator: {AUDITS[header.audit]}{_unlike(header)}",
        *_inspection(header),
        *([f"- Source: {origin.name}"] if origin else []),
        *([f"- Label ids, here -> of the {theirs}: {renumbered}"] if renumbered else []),
        *(f"- Cite: {entry}" for entry in header.citation),
        f"- Made with {made}, on {header.device}",
        "",
        "`manifest.json` says where each case comes from and gives the hashes of its files;",
        f"`{MONTAGE}` shows the first ones. The same again:",
        "",
        "```bash",
        " ".join(command),
        "```",
        "",
        *_needed(settings),
    ]
    return "\n".join(lines)


def _terms(header: Manifest) -> str:
    """What the generator's licence does not allow."""
    uses = {"commercial use": header.commercial_use, "redistribution": header.redistribution}
    refused = [use for use, allowed in uses.items() if allowed is False]
    return f". It does not allow {' or '.join(refused)}" if refused else ""


def _needed(settings: Settings) -> list[str]:
    """Which files the command stands for."""
    if settings.inspection is None:
        return []
    files = {"DETECTOR": settings.inspection.detector, "SEGMENTER": settings.inspection.segmenter}
    return [f"{word} is the file with the SHA-256 {digest}." for word, digest in files.items() if digest] + [
        ""
    ]


def _unlike(header: Manifest) -> str:
    """What makes this dataset another one than that of the generator's audit."""
    if not header.audit_with_rejection or header.settings.inspection is not None:
        return ""
    return " (among samples of which copies had been refused; here none was)"


def _inspection(header: Manifest) -> list[str]:
    """What candidates were refused for, where they were looked at."""
    settings, inspected = header.settings, header.inspected
    if settings.inspection is None or inspected is None:
        return ["- Candidates were not inspected for copies"]
    lines = [f"- Inspected: {inspected.candidates} candidates for {settings.cases} cases; refused were"]
    for name, words in settings.inspection.checks.items():
        real = settings.inspection.real.get(name)
        beside = "" if real is None else f"; of real held-out scans it refuses {real:.1%}"
        lines.append(f"  - {name}: {inspected.rejected[name]} ({words}{beside})")
    return lines


def _advice(settings: Settings) -> str:
    """What to do with a dataset that has a caveat."""
    if not settings.labels:
        return "Use the images for pretraining without supervision."
    return "The generator knows no labels and could not follow them: look how far they fit before you train."
