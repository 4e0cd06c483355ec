"""What a transform costs: CPU-seconds a sample, beside TorchIO's, MONAI's and nnU-Net's own, in one run.

python benchmarks/transform_cost/run.py --data SCANS --work CACHE --patch-generator FOLDER

On one thread, in this process; each transform works on a case that has been read already, as behind a cache.
The generator of patches, such as the one of `patch_seams`, varies a whole fetal atlas.
Also how long nnU-Net and MONAI take for a training iteration on this machine, with and without a bank.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torchio as tio
from matplotlib.figure import Figure
from monai.data import DataLoader, MetaTensor
from monai.data import Dataset as MonaiDataset
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Rand3DElasticd,
    ResizeWithPadOrCropd,
)

from diffaug.bank import build_bank
from diffaug.bank.bank import BankCase, BankSettings, case_file, salt_of, sample_hash
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.training_scans import voxel_hash
from diffaug.files import atomic_path, atomic_write_json, atomic_write_text
from diffaug.operations import Variation
from diffaug.transforms.monai import RandFromBankd, RandVariationd
from diffaug.transforms.torchio import RandomFromBank, RandomInpainting, RandomRepaint, RandomVariation

HERE = Path(__file__).parent
GENERATOR = "hippocampus-mr"
REFERENCE = "TorchIO RandomElasticDeformation"
# Repetitions of each transform: at least so many, and so many seconds.
LEAST, SECONDS = 5, 4.0
# Samples that a loader gives.
LOADED = 160
# Of nnU-Net's own pipeline, on patches of this shape.
PATCHES = {"hippocampus": (40, 56, 40), "fetal atlas": (128, 160, 128)}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--patch-generator", type=Path, required=True, help="fitted to the fetal atlases")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"samples": {}, "iterations": {}}
    hippocampus, atlas = cases(options.data)
    small = samples("hippocampus", hippocampus, GENERATOR, options.work)
    found["iterations"] = {"MONAI": monai_iteration(small), "nnU-Net": nnunet_iteration(options)}
    found["loaders"] = loaders(hippocampus, options.work)
    large = samples("fetal atlas", atlas, str(options.patch_generator), options.work)
    found["samples"] = {"hippocampus": small, "fetal atlas": large}
    atomic_write_json(options.results / "cost.json", found)
    atomic_write_text(options.results / "table.md", "\n".join(table(found)) + "\n")
    plot(found["samples"], options.results / "cost.png")


def cases(data: Path) -> tuple[Dataset, Dataset]:
    """Datasets of one labelled case each."""
    hippocampus, atlas = (read_dataset(data / name) for name in ("Task04_Hippocampus", "FetalAtlas_SB"))
    assert hippocampus.split is not None
    first = [case for case in hippocampus.cases if case.name == hippocampus.split["train"][0]]
    return (
        replace(hippocampus, cases=tuple(first), split=None),
        replace(atlas, cases=atlas.cases[:1], split=None),
    )


def samples(name: str, dataset: Dataset, generator: str, work_folder: Path) -> dict[str, float]:
    """CPU-seconds of each transform on the case."""
    image, label = dataset.cases[0].images[0], dataset.cases[0].label
    assert label is not None
    subject = tio.Subject(image=tio.ScalarImage(image), label=tio.LabelMap(label))
    subject.load()
    scan = nib.load(image)
    data = {
        "image": MetaTensor(
            subject["image"].data.float(), affine=scan.affine, meta={"filename_or_obj": str(image)}
        ),
        "label": MetaTensor(subject["label"].data.float(), affine=scan.affine),
    }
    bank = make_bank(name, dataset, work_folder)
    work: dict[str, Callable[[], object]] = {
        REFERENCE: bind(tio.RandomElasticDeformation(p=1), subject),
        "TorchIO RandomMotion": bind(tio.RandomMotion(p=1), subject),
        "TorchIO RandomGhosting": bind(tio.RandomGhosting(p=1), subject),
        "MONAI Rand3DElasticd": bind(
            Rand3DElasticd(["image", "label"], (5, 8), (50, 150), prob=1, mode=("bilinear", "nearest")), data
        ),
        "nnU-Net's pipeline, a patch": nnunet_pipeline(subject, PATCHES[name]),
        "RandomFromBank (TorchIO)": bind(RandomFromBank(bank, p=1), subject),
        "RandFromBankd (MONAI)": bind(RandFromBankd("image", bank, prob=1), data),
    }
    work |= {
        "RandomVariation": bind(RandomVariation(generator, p=1), subject),
        "RandVariationd (MONAI)": bind(RandVariationd("image", generator=generator, prob=1), data),
        "RandomInpainting": bind(RandomInpainting(generator, p=1), subject),
        "RandomRepaint": bind(RandomRepaint(generator, p=1), subject),
    }
    found = {}
    for title, function in work.items():
        found[title] = cpu_seconds(function)
        print(f"{name}: {title}: {1000 * found[title]:.2f} ms", file=sys.stderr, flush=True)
    return found


def bind(transform: Callable[[Any], object], case: Any) -> Callable[[], object]:
    """The transform on a case."""
    return lambda: transform(case)


def cpu_seconds(function: Callable[[], object]) -> float:
    """Mean CPU time of a call, after one that loads what is needed. Random pipelines do much in few calls;
    what takes longer than `SECONDS` is called twice, the first call included."""
    begun, started = time.perf_counter(), time.process_time()
    function()
    if time.perf_counter() - begun > SECONDS:
        function()
        return (time.process_time() - started) / 2
    count, begun, started = 0, time.perf_counter(), time.process_time()
    while count < LEAST or time.perf_counter() - begun < SECONDS:
        function()
        count += 1
    return (time.process_time() - started) / count


def make_bank(name: str, dataset: Dataset, work: Path) -> Path:
    """A bank of one case. That of a volume for which there is no generator holds copies of it: what a draw
    costs does not depend on what is drawn."""
    folder = work / f"bank-{name.replace(' ', '-')}"
    if folder.exists():
        return folder
    if name == "hippocampus":
        build_bank(Variation(GENERATOR), dataset, folder, per_case=8)
        return folder
    image = dataset.cases[0].images[0]
    scan: Any = nib.load(image)
    voxels = np.asarray(scan.dataobj)[None]
    settings = BankSettings(
        generator="none",
        weights="none",
        generator_licence="none",
        operation="variation",
        ranges={},
        dataset=name,
        licence=None,
        reference=None,
        cases=["atlas"],
        per_case=8,
        seed=0,
    )
    (folder / "cases").mkdir(parents=True)
    np.save(folder / "cases" / "atlas.npy", np.stack([voxels] * 8))
    record = BankCase(
        name="atlas",
        patient="atlas",
        files=[image.name],
        voxels=voxel_hash(voxels.astype(np.float32), salt_of(settings)),
        canonical="none",
        sample=sample_hash([voxels], salt_of(settings)),
        shape=voxels.shape,
        affine=scan.affine.tolist(),
        parameters=[{}] * 8,
    )
    atomic_write_json(case_file(folder, "atlas"), record.model_dump(mode="json"))
    atomic_write_json(folder / "bank.json", settings.model_dump(mode="json"))
    return folder


def nnunet_pipeline(subject: tio.Subject, patch: tuple[int, ...]) -> Callable[[], object]:
    """nnU-Net's training transforms on the larger patch that it crops for them."""
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    angle = (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)
    initial = [int(n) for n in get_patch_size(patch, angle, angle, angle, (0.85, 1.25))]
    transforms = nnUNetTrainer.get_training_transforms(patch, angle, [[1, 1, 1], [0.5] * 3], (0, 1, 2), False)
    grown = tio.CropOrPad(initial)(subject)
    image, label = grown["image"].data.float(), grown["label"].data.short()
    return lambda: transforms(image=image.clone(), segmentation=label.clone())


def monai_iteration(costs: dict[str, float]) -> dict[str, float]:
    """Wall-clock seconds of a training step of a MONAI U-Net on four hippocampi, and what a bank adds."""
    torch.set_num_threads(2)
    network = UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
    optimiser = torch.optim.AdamW(network.parameters())
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    image, label = torch.randn(4, 1, 40, 56, 40), torch.randint(0, 3, (4, 1, 40, 56, 40))

    def step() -> None:
        optimiser.zero_grad()
        criterion(network(image), label).backward()
        optimiser.step()

    seconds = wall_seconds(step)
    torch.set_num_threads(1)
    return {"seconds": seconds, "bank_seconds": 4 * costs["RandFromBankd (MONAI)"]}


def loaders(dataset: Dataset, work: Path) -> dict[str, dict[str, float]]:
    """MONAI's DataLoader with a worker, transforms applied to every case: CPU-seconds a sample of all
    processes together, the worker's start included, and training iterations a second on the other core."""
    image, label = dataset.cases[0].images[0], dataset.cases[0].label
    data = LoadImaged(["image", "label"])({"image": str(image), "label": str(label)})
    data = EnsureChannelFirstd(["image", "label"])(data)
    bank = make_bank("hippocampus", dataset, work)
    transforms: dict[str, list[Any]] = {
        "none": [],
        "Rand3DElasticd": [
            Rand3DElasticd(["image", "label"], (5, 8), (50, 150), prob=1, mode=("bilinear", "nearest"))
        ],
        "RandFromBankd": [RandFromBankd("image", bank, prob=1)],
        "RandVariationd": [RandVariationd("image", generator=GENERATOR, prob=1)],
    }
    found = {}
    for title, own in transforms.items():
        pipeline = Compose([*own, ResizeWithPadOrCropd(["image", "label"], (40, 56, 40))])
        cases = MonaiDataset([data] * LOADED, pipeline)
        started = cpu_of_all()
        for _ in DataLoader(cases, batch_size=4, num_workers=1):
            pass
        seconds = (cpu_of_all() - started) / LOADED
        found[title] = {"cpu_seconds": seconds, "iterations_per_second": training_speed(cases)}
        print(f"loader: {title}: {found[title]}", file=sys.stderr, flush=True)
    return found


def cpu_of_all() -> float:
    """CPU-seconds of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def training_speed(cases: MonaiDataset) -> float:
    """Iterations a second of a MONAI U-Net, batch 4, after the first one, which waits for the worker."""
    network = UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
    optimiser = torch.optim.AdamW(network.parameters())
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    begun = 0.0
    for step, batch in enumerate(DataLoader(cases, batch_size=4, num_workers=1)):
        optimiser.zero_grad()
        criterion(network(batch["image"].as_tensor()), batch["label"].as_tensor()).backward()
        optimiser.step()
        if step == 0:
            begun = time.perf_counter()
    return (LOADED // 4 - 1) / (time.perf_counter() - begun)


def wall_seconds(function: Callable[[], object]) -> float:
    """Median wall-clock time of a call."""
    function()
    times = []
    for _ in range(LEAST):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def nnunet_iteration(options: argparse.Namespace) -> dict[str, float]:
    """Wall-clock seconds of nnU-Net's training iterations on hippocampi, loading and augmenting in the same
    process, with its own trainer and with a bank from which every case is drawn."""
    home = options.work / "nnunet"
    names = {f"nnUNet_{kind}": str(home / kind) for kind in ("raw", "preprocessed", "results")}
    environment = os.environ | names | {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
    scripts = Path(sys.executable).parent
    raw = home / "raw" / "Dataset904_Hippocampus"
    if not (home / "preprocessed" / raw.name / "diffaug.json").exists():
        shutil.rmtree(home, ignore_errors=True)
        source = options.data / "Task04_Hippocampus"
        training = json.loads((source / "splits.json").read_text())["train"][:10]
        for kind, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
            (raw / kind).mkdir(parents=True)
            for name in training:
                shutil.copy(source / kind / f"{name}.nii.gz", raw / kind / f"{name}{ending}.nii.gz")
        description = {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
            "numTraining": len(training),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(description))
        bank = options.work / "bank-nnunet"
        shutil.rmtree(bank, ignore_errors=True)
        for command in (
            [
                scripts / "nnUNetv2_plan_and_preprocess",
                "-d",
                "904",
                "-c",
                "3d_fullres",
                "-np",
                "1",
                "-npfp",
                "1",
            ],
            [scripts / "diffaug", "bank", "build", "--data", raw, "--per-case", "4", "--output", bank],
            [scripts / "diffaug", "nnunet", "prepare", "904", "--bank", bank, "--probability", "1"],
        ):
            subprocess.run([str(part) for part in command], env=environment, check=True)
        settings = home / "preprocessed" / raw.name / "diffaug.json"
        settings.write_text(settings.read_text().replace('"refuse"', '"warn"'))
    script = [sys.executable, str(HERE / "nnunet_iterations.py"), str(home / "preprocessed" / raw.name)]
    environment["nnUNet_n_proc_DA"] = "0"
    printed = subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def plot(costs: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of CPU time, diffaug's own in colour."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
        titles = list(costs["hippocampus"])[::-1]
        known = [title for title in titles if title in found]
        colours = ["#0072b2" if title.startswith("Ran") else "0.65" for title in known]
        axes.barh([titles.index(t) for t in known], [1000 * found[t] for t in known], color=colours)
        axes.set(xscale="log", title=name, xlabel="ms of CPU a sample", yticks=range(len(titles)))
        axes.set_yticklabels(titles, fontsize=8)
        axes.axvline(100 * found[REFERENCE], color="#a33100", linewidth=0.8, linestyle=":")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def table(found: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table: milliseconds of CPU time, and parts of TorchIO's elastic deformation."""
    names = list(found["samples"])
    head = " | ".join(f"{name}, ms of CPU | times {REFERENCE}" for name in names)
    lines = [f"| transform | {head} |", "| --- |" + " --- |" * (2 * len(names))]
    for title in found["samples"]["hippocampus"]:
        cells = []
        for own in found["samples"].values():
            known = title in own
            cells.append(f"{1000 * own[title]:.2f}" if known else "–")
            cells.append(f"{own[title] / own[REFERENCE]:.3f}" if known else "–")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    nnunet, monai = found["iterations"]["nnU-Net"], found["iterations"]["MONAI"]
    extra = nnunet["batch"] * nnunet["draw_extra"] / (nnunet["load"] + nnunet["step"])
    share = monai["bank_seconds"] / monai["seconds"]
    return [
        *lines,
        "",
        f"nnU-Net, batch {nnunet['batch']:.0f}, all in one process: loading and augmenting "
        f"{nnunet['load']:.3f} s, with every case from a bank {nnunet['load_bank']:.3f} s; training step "
        f"{nnunet['step']:.3f} s. Reading a case takes {1000 * nnunet['draw_extra']:.2f} ms more from a "
        f"bank, {100 * extra:.2f} % of an iteration.",
        "",
        "MONAI's DataLoader with a worker, batch 4: "
        + "; ".join(
            f"{title} {1000 * own['cpu_seconds']:.1f} ms of CPU a sample in all processes, "
            f"{own['iterations_per_second']:.2f} training iterations a second"
            for title, own in found["loaders"].items()
        )
        + ".",
        "",
        f"MONAI U-Net, batch 4: training step {monai['seconds']:.3f} s; four draws from a bank "
        f"{1000 * monai['bank_seconds']:.1f} ms of CPU, {100 * share:.2f} % of it.",
    ]


if __name__ == "__main__":
    main()
