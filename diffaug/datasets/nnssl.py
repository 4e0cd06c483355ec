"""The description of a dataset that nnssl pretrains on: collection, dataset, subject, session, image."""

from pathlib import Path
from typing import Any

from diffaug.datasets.reading import Dataset
from diffaug.files import atomic_write_json

FILE = "pretrain_data.json"


def write_nnssl(dataset: Dataset) -> Path:
    """Write `pretrain_data.json` (nnssl 0.1) into a dataset's folder; paths of images in it are absolute.

    Each patient is a subject and each case a session, which holds an image for each channel.
    """
    subjects: dict[str, Any] = {}
    for case in dataset.cases:
        sessions = subjects.setdefault(
            case.patient, {"subject_id": case.patient, "subject_info": None, "sessions": {}}
        )["sessions"]
        sessions[case.name] = {
            "session_id": case.name,
            "session_info": None,
            "images": [
                {
                    "name": file.name,
                    "modality": dataset.channels[channel],
                    "image_info": {},
                    "image_path": str(file.absolute()),
                    "associated_masks": {"anonymization_mask": None, "anatomy_mask": None},
                }
                for channel, file in enumerate(case.images)
            ],
        }
    content = {
        "collection_index": 1,
        "collection_name": dataset.name,
        "datasets": {
            "1": {
                "dataset_index": 1,
                "dataset_info": {"licence": dataset.licence, "reference": dataset.reference},
                "name": dataset.name,
                "subjects": subjects,
            }
        },
    }
    path = dataset.root / FILE
    atomic_write_json(path, content)
    return path
