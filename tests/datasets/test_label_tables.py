from pathlib import Path

import pytest

from diffaug.datasets.label_tables import read_label_table
from diffaug.errors import LabelError

LABELS = {0: "background", 1: "Liver", 23: "lung tumor", 200: "body"}


def write(folder: Path, text: str) -> Path:
    file = folder / "table.csv"
    file.write_text(text)
    return file


def test_ids_and_names_lead_to_the_generators_ids(tmp_path: Path) -> None:
    table = write(tmp_path, "name,source,generator\nliver, 5 ,liver\nskin,6,200\nlesion,7,Lung Tumor\n")
    assert read_label_table(table, LABELS) == {5: 1, 6: 200, 7: 23}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source\n1\n", "has no column generator"),
        ("", "has no column source and generator"),
        ("source,generator\n1,spleen\n", r"line 2: '1' to 'spleen' is no label id and an id or name"),
        ("source,generator\n1,2\n", "line 2: '1' to '2'"),
        ("source,generator\nliver,1\n", "line 2: 'liver' to '1'"),
        ("source,generator\n1,1\n1,200\n", "line 3: 1 is there twice"),
        ("source,generator\n1\n", "line 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=message):
        read_label_table(write(tmp_path, text), LABELS)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"cannot read .*none.csv"):
        read_label_table(tmp_path / "none.csv", LABELS)
