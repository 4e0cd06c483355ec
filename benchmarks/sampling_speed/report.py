"""The tables, the ratios and the plot, made from the measured cells."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from competitors import COMPETITORS, SEED_RECIPE

from diffaug.files import atomic_path, atomic_write_text, read_json

Cells = dict[str, dict[str, Any]]
SYSTEMS = {
    "seed": "Medical Diffusion",
    "monai": "MONAI AutoencoderKL + DiffusionModelUNet",
    "flagship": "hippocampus-mr",
}
COLOURS = {"seed": "#56b4e9", "monai": "#e69f00", "flagship": "#009e73"}
# Slower, faster, and how many times faster that is meant to be (None: reported only).
EQUAL_STEPS = (
    ("seed-20", "flagship-20", 10.0),
    ("seed-20-diffaug", "flagship-20", 10.0),
    ("seed-20-bfloat16", "flagship-20", 10.0),
    ("seed-20-latent4", "flagship-20", None),
    ("monai-20", "flagship-20", 5.0),
    ("monai-20-bfloat16", "flagship-20", 5.0),
    ("monai-20-batch2", "flagship-20", 5.0),
    ("seed-20-bfloat16", "flagship-20-unguided", None),
    ("monai-20-bfloat16", "flagship-20-unguided", None),
)
OWN_RECIPES = (
    (SEED_RECIPE.name, "flagship-default", None),
    ("monai-50", "flagship-default", None),
    ("monai-50-bfloat16", "flagship-default", None),
)
# Processor cores used by other processes above which times are not to be trusted.
IDLE = 0.1
MARKS = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Ratio:
    """How many times faster: of the medians, and between the extremes of the volumes."""

    slower: str
    faster: str
    value: float
    low: float
    high: float
    target: float | None

    @property
    def verdict(self) -> str:
        """Whether the target is met; a dash where there is none."""
        if self.target is None:
            return "–"
        return "met" if self.value >= self.target else "not met"


def ratio(cells: Cells, slower: str, faster: str, target: float | None) -> Ratio | None:
    """One ratio; None where a cell is missing, or the two are of different machines, threads or versions."""
    if slower not in cells or faster not in cells or not comparable(cells[slower], cells[faster]):
        return None
    a, b = (cells[name]["values"]["seconds"] for name in (slower, faster))
    return Ratio(slower, faster, a["median"] / b["median"], a["min"] / b["max"], a["max"] / b["min"], target)


def comparable(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two cells were measured in the same surroundings."""
    return surroundings(first) == surroundings(second)


def surroundings(cell: dict[str, Any]) -> dict[str, Any]:
    """Machine, threads, allocator, versions and grid."""
    names = ("processor", "cores", "threads", "malloc", "versions", "shape")
    return {name: cell["identity"][name] for name in names}


def read_cells(folder: Path) -> Cells:
    """The cells that are there, in the competitors' order: those of the times with the others' memory."""
    cells = {}
    for competitor in COMPETITORS:
        time, memory = (folder / kind / f"{competitor.name}.json" for kind in ("time", "memory"))
        if time.exists() and memory.exists():
            cell = read_json(time)
            cell["values"]["memory_mib"] = read_json(memory)["values"]["memory_mib"]
            cells[competitor.name] = cell
    return cells


def write_report(folder: Path) -> None:
    """Write `table.md`, `speed.csv` and `speed.png` beside the cells, from what is there."""
    cells = read_cells(folder)
    if not cells:
        return
    atomic_write_text(folder / "table.md", "\n".join(table(cells)) + "\n")
    atomic_write_text(folder / "speed.csv", comma_separated(cells))
    plot(cells, folder / "speed.png")


def fill_readme(readme: Path, table: Path) -> None:
    """Replace what is between the marks of the README by the table."""
    begin, end = MARKS
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    found = table.read_text(encoding="utf-8")
    atomic_write_text(readme, f"{before}{begin}\n{found}{end}{after}")


# -------- tables


def table(cells: Cells) -> list[str]:
    """The lines of the Markdown tables, with every figure that can be computed from the cells at hand."""
    head = [
        "networks", "sampler", "steps", "precision", "network calls", "seconds a volume: median (min to max)",
        "volumes a second", "peak memory, MiB (after imports)", "parameters: denoiser + autoencoders",
        "times faster than Medical Diffusion's recipe",
    ]  # fmt: skip
    rows = [competitor_row(cells, name) for name in cells]
    lines = [provenance(cells), "", *markdown(head, rows)]
    for title, asked in (
        ("Times faster at equal steps", EQUAL_STEPS),
        ("Times faster at each one's own recipe", OWN_RECIPES),
    ):
        found = [each for each in (ratio(cells, *entry) for entry in asked) if each is not None]
        if found:
            head = [title, "measured (between the extremes)", "target", ""]
            lines += ["", *markdown(head, [ratio_row(cells, each) for each in found])]
    return lines


def competitor_row(cells: Cells, name: str) -> list[str]:
    """One competitor's figures."""
    values = cells[name]["values"]
    seconds, memory, parameters = values["seconds"], values["memory_mib"], values["parameters"]
    against = ratio(cells, SEED_RECIPE.name, name, None)
    return [
        title(cells[name]),
        values["sampler"],
        str(values["steps"]),
        values["precision"],
        str(values["network_calls"]),
        f"{short(seconds['median'])} ({short(seconds['min'])} to {short(seconds['max'])})",
        short(1 / seconds["median"]),
        f"{memory['peak']:.0f} ({memory['after_imports']:.0f})",
        f"{parameters['denoiser']:,} + {parameters['autoencoders']:,}",
        short(against.value) if against else "–",
    ]


def ratio_row(cells: Cells, found: Ratio) -> list[str]:
    """One ratio, its target and whether that is met."""
    names = " over ".join(label(cells[name]) for name in (found.faster, found.slower))
    target = "reported" if found.target is None else f"at least {found.target:g}"
    measured = f"{short(found.value)} ({short(found.low)} to {short(found.high)})"
    return [names, measured, target, found.verdict]


def title(cell: dict[str, Any]) -> str:
    """Whose networks, and what sets the row apart from others of the same networks."""
    identity = cell["identity"]
    name = SYSTEMS[identity["system"]]
    if identity["system"] == "seed":
        name += f", latent reduced by {identity['downsampling']}"
        if not identity["plain"] and not identity["bfloat16"]:
            name += ", diffaug's convolutions"
    if identity["guidance"] == 1.0:
        name += ", without guidance"
    return name if identity["batch"] == 1 else f"{name}, {identity['batch']} volumes at once"


def label(cell: dict[str, Any]) -> str:
    """A competitor in a few words."""
    values = cell["values"]
    return f"{title(cell)}, {values['steps']} steps, {values['precision']}"


def provenance(cells: Cells) -> str:
    """Where and when the cells were measured, and whether anything speaks against comparing them."""
    first = next(iter(cells.values()))
    where = surroundings(first)
    shape = " x ".join(map(str, where["shape"]))
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    days = sorted({cell["measured"][:10] for cell in cells.values()})
    loads = [cell["load_average"] for cell in cells.values()]
    others = max(cell["values"]["other_processes_cores"] for cell in cells.values())
    text = (
        f"Volumes of {shape} voxels, one at a time unless a row says otherwise; {where['processor']}, "
        f"{where['cores']} cores; threads: {where['threads']}; {versions}; "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}. Load average "
        f"when a cell began (the cell before it counts): {min(loads):.2f} to {max(loads):.2f}; other "
        f"processes used at most {others:.2f} cores."
    )
    if others > IDLE:
        text += " **The machine was not idle: measure again.**"
    if not all(comparable(first, cell) for cell in cells.values()):
        text += " **Not all cells are of this machine, threads and versions: measure with `--again`.**"
    return text


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def short(number: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def comma_separated(cells: Cells) -> str:
    """One line for each competitor, and after its figures where they come from."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for name, cell in cells.items():
        values, identity = cell["values"], cell["identity"]
        row = {
            "name": name,
            "system": identity["system"],
            "sampler": values["sampler"],
            "steps": values["steps"],
            "guidance": values["guidance"],
            "precision": values["precision"],
            "batch": identity["batch"],
            "draws": identity["draws"],
            "seconds_median": round(values["seconds"]["median"], 4),
            "seconds_min": round(values["seconds"]["min"], 4),
            "seconds_max": round(values["seconds"]["max"], 4),
            "volumes_per_second": round(1 / values["seconds"]["median"], 5),
            "network_calls": values["network_calls"],
            "peak_mib": round(values["memory_mib"]["peak"], 1),
            "after_imports_mib": round(values["memory_mib"]["after_imports"], 1),
            "denoiser_parameters": values["parameters"]["denoiser"],
            "autoencoder_parameters": values["parameters"]["autoencoders"],
            "processor": identity["processor"],
            "threads": identity["threads"],
            "torch": identity["versions"]["torch"],
            "load_average": round(cell["load_average"], 2),
            "other_processes_cores": round(values["other_processes_cores"], 3),
            "measured": cell["measured"],
        }
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue()


# -------- plot


def plot(cells: Cells, file: Path) -> None:
    """Seconds a volume, a bar for each competitor, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 0.6 + 0.42 * len(cells)), layout="constrained")
    for place, cell in enumerate(cells.values()):
        values, system = cell["values"], cell["identity"]["system"]
        seconds = values["seconds"]
        spread = [[seconds["median"] - seconds["min"]], [seconds["max"] - seconds["median"]]]
        axis.barh(place, seconds["median"], color=COLOURS[system], xerr=spread, ecolor="0.3")
        axis.annotate(
            f"{short(seconds['median'])} s, {values['memory_mib']['peak']:.0f} MiB",
            (seconds["max"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(cells)), [label(cell) for cell in cells.values()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xmargin(0.25)
    axis.set_xlabel(f"seconds a volume, {next(iter(cells.values()))['identity']['threads']} threads")
    axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
