"""What a built dataset says of itself, in words."""

from diffaug.datasets.manifest import Manifest, Settings

MONTAGE = "montage.png"
README = "README.md"


def sentence(settings: Settings) -> str:
    """What the dataset is."""
    how = {
        "sample": "images and label maps sampled",
        "paint": "images painted for the label maps of {source}",
        "vary": "variations of the cases of {source}",
    }[settings.verb].format(source=settings.source.name if settings.source else "")
    return f"Synthetic: {how} by the generator {settings.generator.name} (diffaug)"


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
    command += [f"--layout {settings.layout}", f"--seed {settings.seed}", f"--steps {parameters.steps}"]
    command.append(f"--guidance {parameters.guidance:g}")
    if parameters.strength is not None:
        command.append(f"--strength {parameters.strength:g}")
    command += [f"--label-mapping {old}={new}" for old, new in settings.label_mapping.items()]
    command.append(f"--output {settings.name}")
    renumbered = ", ".join(f"{new} -> {old}" for new, old in header.label_ids.items() if new != old)
    made = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    lines = [
        f"# {settings.name}",
        "",
        f"{sentence(settings)}. {settings.cases} cases, none of them a scan of a person.",
        "",
        "Train with them, do not validate on them: a figure measured on synthetic cases says little about",
        "real ones.",
    ]
    if origin:
        lines += [
            "Each case shows the anatomy of a real one, which `manifest.json` names under `source`, with",
            "hashes of its files: keep it out of the training of a network that is validated or tested on",
            "that patient, and ask whoever owns the source before you share the dataset.",
        ]
    lines += [
        "",
        f"- Licence: {header.licence}",
        f"- Generator: {settings.generator.name}, weights {settings.generator.weights}",
        *([f"- Source: {origin.name}"] if origin else []),
        *([f"- Label ids, here -> of the generator: {renumbered}"] if renumbered else []),
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
    ]
    return "\n".join(lines)
