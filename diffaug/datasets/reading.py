"""Reading a user's dataset of scans: which files make a case.

Three layouts are known, told apart by what lies in the folder:

- the Medical Segmentation Decathlon's: `dataset.json` lists image and (optionally) label under `training` and
  names the channels under `modality`; several channels are the fourth axis of one file;
- nnU-Net raw: `dataset.json` has `channel_names`, `labels`, `file_ending`; images are
  `imagesTr/CASE_0000.nii.gz`, one file per channel, labels `labelsTr/CASE.nii.gz`, unless `labels` names only
  the background and there is no `labelsTr`;
- two folders of images and labels with equal file names (`images` and `labels`, `imagesTr` and `labelsTr`, or
  any two that the caller names), images optionally with nnU-Net's channel number, labels optional.

Reading settles names, channels, labels, patients and the split, and opens scans only where nothing else says
which labels or channels there are. `diffaug.datasets.checking.check_dataset` opens all of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffaug.datasets.splits import read_patients, read_split
from diffaug.datasets.volumes import LARGEST_LABEL, CaseFiles, label_array, read_volume
from diffaug.errors import DatasetError, DiffaugError
from diffaug.files import read_json

ENDINGS = (".nii.gz", ".nii")
FOLDER_PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"))
# More different values than this in a label map mean that it is an image.
MOST_LABELS = 256

_CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Dataset:
    """A dataset as its folder describes it; the files themselves are not yet checked.

    Attributes:
        name: as `dataset.json` gives it, else the folder's name.
        root: the dataset's folder, absolute.
        cases: sorted by name.
        channels: name of each channel, in order.
        labels: label id -> name, 0 being the background; empty where no case has a label.
        licence, reference: as `dataset.json` gives them.
        split: cases of "train", "validation" and "test" (always these three; "train" is never empty), or None
            where there is no split file.
        patients_given: whether a table says who the patients are; without one each case is its own patient.
        strays: scans in the dataset's folders that belong to no case, such as a label whose image is missing.
    """

    name: str
    root: Path
    cases: tuple[CaseFiles, ...]
    channels: tuple[str, ...]
    labels: dict[int, str]
    licence: str | None
    reference: str | None
    split: dict[str, tuple[str, ...]] | None
    patients_given: bool
    strays: tuple[Path, ...] = ()

    @property
    def training_cases(self) -> tuple[CaseFiles, ...]:
        """The cases of the split that train; all of a dataset without a split."""
        if self.split is None:
            return self.cases
        wanted = set(self.split["train"])
        return tuple(case for case in self.cases if case.name in wanted)


# Name, images and label of a case whose patient is not yet known.
_Case = tuple[str, tuple[Path, ...], Path | None]


class _Found(NamedTuple):
    """What a layout's folder holds."""

    cases: list[_Case]
    channels: tuple[str, ...]
    labels: dict[int, str]
    strays: tuple[Path, ...] = ()


# -------- whole datasets


def read_dataset(
    path: Path,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    split: Path | None = None,
    patients: Path | None = None,
    without_patient: Collection[str] = (),
) -> Dataset:
    """Find the cases, channels, labels, patients and split of a dataset.

    Paths of the keyword arguments count from `path` or, where they do not exist there, from the working
    directory. Paths inside `dataset.json` are not trusted: they must stay within `path`, links resolved.

    Args:
        path: the dataset's folder.
        images: folder of images, for the layout of two folders; a `dataset.json` in `path` then gives names
            (of the dataset, channels and labels), but no files.
        labels: folder of label maps to go with `images`; without it no case has a label.
        split: JSON with case names under "train", "validation" and "test", or nnU-Net's `splits_final.json`,
            of which the first fold counts. Default: `splits.json` in `path`, if it is there.
        patients: CSV with the columns `case` and `patient`. Default: `patients.csv` in `path`, if there.
        without_patient: cases that the table need not name, such as synthetic ones: each is its own patient.

    Raises:
        DatasetError: listing everything that keeps the description from being understood.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise DatasetError([f"{root} is not a folder: give the dataset's folder"])
    description_file = root / "dataset.json"
    try:
        description = read_json(description_file) if description_file.is_file() else {}
    except DiffaugError as error:
        raise DatasetError([str(error)]) from error
    if not isinstance(description, dict):
        raise DatasetError([f"{description_file} holds a {type(description).__name__}, not a JSON object"])

    problems: list[str] = []
    if images is not None:
        label_folder = None if labels is None else _locate(root, labels)
        found = _read_folders(root, _locate(root, images), label_folder, description, problems)
    elif labels is not None:
        raise DatasetError([f"labels {labels} without images: name the folder of the images, too"])
    elif "channel_names" in description or "file_ending" in description:
        found = _read_nnunet(root, description, problems)
    elif "training" in description:
        found = _read_decathlon(root, description, problems)
    else:
        found = _read_folders(root, *_folder_pair(root, bool(description)), description, problems)
    if not found.cases and not problems:
        problems.append(f"{root} holds no case: NIfTI files ({' or '.join(ENDINGS)}) are expected")

    names = [name for name, _, _ in found.cases]
    patients_file = _side_file(root, patients, "patients.csv")
    named = [name for name in names if name not in set(without_patient)]
    patient_of = read_patients(patients_file, named, problems) if patients_file else {}
    split_file = _side_file(root, split, "splits.json")
    subsets = read_split(split_file, names, patient_of, problems) if split_file else None
    if problems:
        raise DatasetError(problems)
    return Dataset(
        name=_text(description, "name") or root.name,
        root=root,
        cases=tuple(
            CaseFiles(*case, patient_of.get(case[0], case[0]))
            for case in sorted(found.cases, key=lambda case: case[0])
        ),
        channels=found.channels,
        labels=found.labels if any(label is not None for _, _, label in found.cases) else {},
        licence=_text(description, "licence") or _text(description, "license"),
        reference=_text(description, "reference"),
        split=subsets,
        patients_given=patients_file is not None,
        strays=found.strays,
    )


def _read_decathlon(root: Path, description: dict[str, Any], problems: list[str]) -> _Found:
    """Cases as `training` of a decathlon's `dataset.json` lists them."""
    file = root / "dataset.json"
    cases: list[_Case] = []
    entries = description["training"]
    if not isinstance(entries, list):
        problems.append(f'{file}: "training" must be a list of {{"image", "label"}}, not {entries!r:.80}')
        entries = []
    for index, entry in enumerate(entries):
        where = f"{file}: training[{index}]"
        if not isinstance(entry, dict) or "image" not in entry:
            problems.append(f'{where} must be {{"image": ..., "label": ...}}, not {entry!r:.80}')
            continue
        image = _named_path(root, entry["image"], f"{where}.image", problems)
        label = None
        if entry.get("label") is not None:
            label = _named_path(root, entry["label"], f"{where}.label", problems)
        if image is not None and not image.name.startswith("."):
            cases.append((_stem(image), (image,), label))
    channels = _channel_names(description, file, problems)
    if not channels and "modality" not in description:
        problems.append(f'{file} does not name the channels: add for example "modality": {{"0": "MRI"}}')
    return _Found(cases, channels, _vocabulary(description, file, problems))


def _read_nnunet(root: Path, description: dict[str, Any], problems: list[str]) -> _Found:
    """Cases of an nnU-Net raw dataset, by listing `imagesTr` or from the explicit lists under `dataset`."""
    file = root / "dataset.json"
    ending = description.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        problems.append(f"{file}: file_ending {ending!r} cannot be read: convert to {' or '.join(ENDINGS)}")
        return _Found([], (), {})
    channels = _channel_names(description, file, problems)
    if not channels and not problems:
        problems.append(f'{file} does not name the channels: add for example "channel_names": {{"0": "MRI"}}')
    labels = _vocabulary(description, file, problems)
    if "dataset" in description:
        return _Found(_explicit_cases(root, description["dataset"], problems), channels, labels)

    images, label_folder = root / "imagesTr", root / "labelsTr"
    if not images.is_dir():
        problems.append(f"{images} is missing: an nnU-Net raw dataset keeps its training images there")
        return _Found([], channels, labels)
    scans, label_files = _scans(images, ending), _scans(label_folder, ending)
    by_case, strays = _group_channels(scans)
    strays += [file for found in by_case.values() for index, file in found.items() if index >= len(channels)]
    strays += [label for label in label_files if _stem(label) not in by_case]
    labelled = label_folder.is_dir() or set(labels) != {0}
    cases: list[_Case] = []
    for name in by_case:
        files = tuple(images / f"{name}_{index:04d}{ending}" for index in range(len(channels)))
        cases.append((name, files, label_folder / f"{name}{ending}" if labelled else None))
    return _Found(cases, channels, labels, tuple(sorted(strays)))


def _explicit_cases(root: Path, listed: Any, problems: list[str]) -> list[_Case]:
    """Cases of nnU-Net's optional `dataset` key: {case: {"images": [...], "label": ...}}."""
    cases: list[_Case] = []
    for name, entry in listed.items() if isinstance(listed, dict) else [("", listed)]:
        where = f"{root / 'dataset.json'}: dataset[{name!r}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or not entry["images"]:
            problems.append(f'{where} must be {{"images": [...], "label": ...}}, not {entry!r:.80}')
            continue
        if not name or name.startswith(".") or set(name) & set("/\\\0"):
            problems.append(f"{where}: a case's name serves as a file name: no slashes, no dot at the start")
            continue
        paths = [_named_path(root, image, f"{where}.images", problems) for image in entry["images"]]
        label = _named_path(root, entry.get("label"), f"{where}.label", problems)
        cases.append((name, tuple(path for path in paths if path is not None), label))
    return cases


def _read_folders(
    root: Path, images: Path, labels: Path | None, description: dict[str, Any], problems: list[str]
) -> _Found:
    """Cases of a folder of images and, optionally, one of labels, matched by file name."""
    for folder in (images, labels):
        if folder is not None and not folder.is_dir():
            problems.append(f"{folder} is not a folder: name the folders of the images and of the labels")
    scans = _scans(images)
    label_files = _scans(labels) if labels else []
    label_of = {_stem(file): file for file in reversed(label_files)}
    by_case: Mapping[str, Mapping[int, Path]]
    if _has_channel_suffixes([_stem(scan) for scan in scans], set(label_of)):
        by_case, strays = _group_channels(scans)
        count = 1 + max(index for found in by_case.values() for index in found)
    else:
        by_case = {_stem(scan): {0: scan} for scan in reversed(scans)}
        strays, count = [scan for scan in scans if by_case[_stem(scan)][0] != scan], 1
    cases: list[_Case] = []
    for name, found in by_case.items():
        ending = _ending(next(iter(found.values())))
        files = tuple(found.get(index, images / f"{name}_{index:04d}{ending}") for index in range(count))
        cases.append((name, files, label_of.get(name)))
    strays += [file for file in label_files if label_of[_stem(file)] != file or _stem(file) not in by_case]

    file = root / "dataset.json"
    names = _channel_names(description, file, problems)
    if not names and not problems:
        names = tuple(f"channel {index}" for index in range(count if count > 1 else _stored_channels(scans)))
    if "labels" in description:
        vocabulary = _vocabulary(description, file, problems)
    else:
        vocabulary = _observed_labels([label for _, _, label in cases if label is not None], problems)
    return _Found(cases, names, vocabulary, tuple(sorted(strays)))


def _folder_pair(root: Path, described: bool) -> tuple[Path, Path]:
    """The two folders of a dataset whose `dataset.json` names no layout, or that has none."""
    pairs = [(root / images, root / labels) for images, labels in FOLDER_PAIRS]
    for images, labels in pairs:
        if images.is_dir() and labels.is_dir() and not described:
            return images, labels
    found = ", ".join(sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))[:10])
    reason = "it has no dataset.json, and neither the folders images and labels nor imagesTr and labelsTr"
    if described:
        reason = "its dataset.json has neither training (the decathlon's key) nor channel_names (nnU-Net's)"
    raise DatasetError(
        [
            f"{root} has no layout that is known here: {reason}. It holds: {found or 'nothing'}. Put images "
            "and label maps of equal file names in two folders named images and labels (diffaug fit takes "
            "folders of other names: --images imagesTr --labels labelsTr; labels may be left out)"
        ]
    )


# -------- names, labels, channels


def _scans(folder: Path, ending: str | None = None) -> list[Path]:
    """NIfTI files in a folder, sorted, without hidden ones (macOS writes a `._` twin of every file)."""
    if not folder.is_dir():
        return []
    endings = ENDINGS if ending is None else (ending,)
    shown = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry for entry in shown if _ending(entry) in endings and entry.is_file())


def _ending(path: Path) -> str | None:
    return next((ending for ending in ENDINGS if path.name.endswith(ending) and path.name != ending), None)


def _stem(path: Path) -> str:
    return path.name.removesuffix(_ending(path) or "")


def _group_channels(scans: Iterable[Path]) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Files CASE_0000, CASE_0001, ... by case and channel number, and the files that are not named so."""
    by_case: dict[str, dict[int, Path]] = defaultdict(dict)
    strays = []
    for scan in scans:
        match = _CHANNEL_SUFFIX.fullmatch(_stem(scan))
        if match is None or int(match[2]) in by_case[match[1]]:
            strays.append(scan)
        else:
            by_case[match[1]][int(match[2])] = scan
    return dict(by_case), strays


def _has_channel_suffixes(stems: Sequence[str], labels: set[str]) -> bool:
    """Whether a final `_0000` is a channel number or, as in `patient_0042`, part of the case's name.

    The labels' names decide. Without labels it is a channel number if every case would then have the same
    channels, starting at 0, and they are not all one case.
    """
    matches = [_CHANNEL_SUFFIX.fullmatch(stem) for stem in stems]
    if not stems or labels & set(stems):
        return False
    bases = {match[1] for match in matches if match}
    if labels & bases:
        return True
    counts = Counter(match[2] for match in matches if match)
    regular = all(matches) and "0000" in counts and set(counts.values()) == {len(bases)}
    return regular and (len(bases) > 1 or len(counts) == 1)


def _channel_names(description: dict[str, Any], file: Path, problems: list[str]) -> tuple[str, ...]:
    """Channel names of `dataset.json` by number; nothing where it has none."""
    key = "channel_names" if "channel_names" in description else "modality"
    channels = description.get(key)
    if channels is None:
        return ()
    by_number: dict[int | None, Any] = {}
    if isinstance(channels, dict):
        by_number = {_integer(index): name for index, name in channels.items()}
    if not by_number or set(by_number) != set(range(len(by_number))):
        problems.append(
            f'{file}: "{key}" must number the channels from 0 like {{"0": "T1"}}, not {channels!r:.80}'
        )
        return ()
    return tuple(str(by_number[index]) for index in range(len(by_number)))


def _vocabulary(description: dict[str, Any], file: Path, problems: list[str]) -> dict[int, str]:
    """Label ids and names of `dataset.json`, given as {"1": name} or, as nnU-Net does, {name: 1}."""
    given = description.get("labels")
    if not isinstance(given, dict) or not given:
        problems.append(f'{file}: "labels" must be like {{"background": 0, "liver": 1}}, not {given!r:.80}')
        return {}
    by_id = all(_integer(key) is not None for key in given)
    vocabulary: dict[int, str] = {}
    for key, value in given.items():
        name, number = (value, _integer(key)) if by_id else (key, _integer(value))
        if isinstance(value, list):
            problems.append(
                f"{file}: label {key!r} is a region, {value!r}, and regions may overlap: give each label one "
                "id of its own"
            )
        elif name == "ignore" and not by_id:
            problems.append(
                f"{file}: the label 'ignore' ({value!r}) is not supported: annotate those voxels or leave "
                "the cases out, and remove it"
            )
        elif number is None or not 0 <= number <= LARGEST_LABEL:
            problems.append(
                f"{file}: label {key!r}: {value!r}: ids are whole numbers from 0 to {LARGEST_LABEL}"
            )
        elif number in vocabulary:
            problems.append(
                f"{file}: label {number} is both {vocabulary[number]!r} and {name!r}: keep one name"
            )
        else:
            vocabulary[number] = str(name)
    if 0 not in vocabulary:
        problems.append(f'{file}: no label has the id 0: add the background to "labels"')
    return dict(sorted(vocabulary.items()))


def _observed_labels(files: Iterable[Path], problems: list[str]) -> dict[int, str]:
    """The ids found in label maps, for a dataset that does not name them; skips files it cannot read."""
    ids: set[int] = set()
    for file in files:
        try:
            found = np.unique(label_array(read_volume(file).array, file)).tolist()
        except DatasetError:
            continue
        if len(found) > MOST_LABELS:
            problems.append(f"{file} holds {len(found)} different values: is it an image, not a label map?")
        ids.update(found)
    return {0: "background"} | {number: f"label {number}" for number in sorted(ids - {0})} if ids else {}


def _stored_channels(scans: Sequence[Path]) -> int:
    """Number of channels of the first image that can be read: the length of its fourth axis."""
    for scan in scans:
        try:
            shape = read_volume(scan).array.shape
        except DatasetError:
            continue
        return int(shape[3]) if len(shape) == 4 else 1
    return 1


# -------- small parts


def _text(description: Mapping[str, Any], key: str) -> str | None:
    value = description.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _integer(value: Any) -> int | None:
    """A whole number given as such or as text ("1"), else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value) else None


def _locate(root: Path, path: Path) -> Path:
    """A path that the caller gave: from the dataset's folder, or from the working directory."""
    path = Path(path).expanduser()
    return root / path if (root / path).exists() else path.absolute()


def _side_file(root: Path, given: Path | None, default: str) -> Path | None:
    if given is None:
        return root / default if (root / default).is_file() else None
    return _locate(root, given)


def _named_path(root: Path, entry: Any, where: str, problems: list[str]) -> Path | None:
    """A scan that `dataset.json` names: within the dataset's folder, symbolic links resolved."""
    if not isinstance(entry, str) or _ending(Path(entry)) is None:
        problems.append(f"{where} must name a file with the ending {' or '.join(ENDINGS)}, not {entry!r:.80}")
        return None
    path = root / entry
    try:
        target = path.resolve()
        inside = target.is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):
        target, inside = path, False
    if not inside:
        link = ", by a symbolic link" if ".." not in path.parts and not Path(entry).is_absolute() else ""
        problems.append(
            f"{where} is {entry!r}, which leads out of the dataset's folder to {target}{link}: put the file "
            "itself there, or name the folders yourself to diffaug fit (--images ... --labels ...)"
        )
        return None
    return path
