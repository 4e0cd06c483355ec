"""A dataset with the labels of a few training patients: what a group has that labelled no more.

python benchmarks/dice_gain/few_labels.py SCANS/Task04_Hippocampus OUTPUT --labelled 8

The decathlon's layout. Of the cases that train and validate, only `--labelled`, drawn as the benchmark draws
them, keep their label map; the test cases keep theirs.
"""

import argparse
import json
import shutil
from pathlib import Path

from diffaug.benchmark.study import draw_labelled
from diffaug.datasets.reading import read_dataset
from diffaug.files import atomic_write_json


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--labelled", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dataset = read_dataset(options.data)
    assert dataset.split is not None, "the benchmark needs a splits.json"
    training = set(dataset.split["train"])
    validation = set(dataset.split["validation"])
    few = draw_labelled(
        [case for case in dataset.cases if case.name in training], options.labelled, options.seed
    )
    unlabelled = (training | validation) - {case.name for case in few}
    options.output.mkdir(parents=True)
    entries = []
    for case in dataset.cases:
        entry = {}
        files = {"image": case.images[0]} | ({"label": case.label} if case.name not in unlabelled else {})
        for part, file in files.items():
            assert file is not None
            (options.output / f"{part}sTr").mkdir(exist_ok=True)
            shutil.copy(file, options.output / f"{part}sTr" / file.name)
            entry[part] = f"./{part}sTr/{file.name}"
        entries.append(entry)
    for name in ("splits.json", "patients.csv"):
        shutil.copy(dataset.root / name, options.output / name)
    description = json.loads((dataset.root / "dataset.json").read_text())
    atomic_write_json(options.output / "dataset.json", description | {"training": entries})
    print(f"{options.output}: labels of {', '.join(case.name for case in few)}")


if __name__ == "__main__":
    main()
