"""Tables of label ids: a dataset's own, and what a generator calls the same structure."""

import csv
from collections.abc import Mapping
from pathlib import Path

from diffaug.errors import LabelError
from diffaug.generators.labels import CompleteMapping

_HEADER = ("source", "generator")


def read_label_table(path: Path, labels: Mapping[int, str]) -> CompleteMapping:
    """Id of a dataset -> id of the generator.

    Args:
        path: CSV with the columns `source` (an id) and `generator` (an id, or a name among `labels`); other
            columns, such as the dataset's own names, are for readers.
        labels: the generator's.

    Raises:
        LabelError: names the file and the line that is wrong.
    """
    by_name = {name.casefold(): number for number, name in labels.items()}
    mapping = CompleteMapping()
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if missing := [name for name in _HEADER if name not in (rows.fieldnames or ())]:
                raise LabelError(f"{path} has no column {' and '.join(missing)} in its first line")
            for row in rows:
                source, generator = ((row[name] or "").strip() for name in _HEADER)
                target = int(generator) if generator.isdecimal() else by_name.get(generator.casefold())
                if not source.isdecimal() or target is None or target not in labels:
                    raise LabelError(
                        f"{path}, line {rows.line_num}: {source!r} to {generator!r} is no label id and an id "
                        f"or name that the generator knows ({_some(labels)})"
                    )
                if int(source) in mapping:
                    raise LabelError(f"{path}, line {rows.line_num}: {source} is there twice")
                mapping[int(source)] = target
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"cannot read {path}: {error}") from error
    return mapping


def _some(labels: Mapping[int, str]) -> str:
    shown = [f"{number}: {name}" for number, name in labels.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
