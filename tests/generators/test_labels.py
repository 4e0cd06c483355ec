import numpy as np
import pytest
import torch
from torch import Tensor

from diffaug.errors import LabelError
from diffaug.generators.labels import CompleteMapping, Vocabulary, spread

NAMES = {7: "tail", 0: "background", 3: "head"}


def label_map(*values: float, dtype: torch.dtype = torch.int16) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(1, 1, -1, 1, 1)


def test_background_comes_first_whatever_the_order_of_the_names() -> None:
    assert Vocabulary(NAMES).ids == [0, 3, 7]
    assert len(Vocabulary(NAMES)) == 3


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.int64,
        torch.float32,
        torch.bfloat16,
    ],
)
def test_to_shares_and_back(dtype: torch.dtype) -> None:
    vocabulary = Vocabulary(NAMES)
    label = label_map(0, 7, 3, 0, 7, dtype=dtype)
    one_hot = spread(vocabulary.indices(label), len(vocabulary))
    assert one_hot.dtype == torch.float32
    assert one_hot[0, :, :, 0, 0].tolist() == [[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
    back = vocabulary.from_scores(one_hot)
    assert back.dtype == torch.int16
    assert torch.equal(back, label.to(torch.int16))


def test_indices_are_places_in_the_vocabulary() -> None:
    assert Vocabulary(NAMES).indices(label_map(7, 0, 3)).flatten().tolist() == [2, 0, 1]


def test_a_boolean_mask_is_a_label_map_of_0_and_1() -> None:
    vocabulary = Vocabulary({0: "background", 1: "organ"})
    assert vocabulary.indices(label_map(1, 0, 1, dtype=torch.bool)).flatten().tolist() == [1, 0, 1]


def test_mapping_translates_merges_and_drops() -> None:
    mapping = {1: 3, 2: 3, 5: 7, 9: 0}
    indices = Vocabulary(NAMES).indices(label_map(0, 1, 2, 5, 9, 3), mapping)
    assert indices.flatten().tolist() == [0, 1, 1, 2, 0, 1]


def test_mapping_may_swap_two_ids() -> None:
    assert Vocabulary(NAMES).indices(label_map(3, 7, 0), {3: 7, 7: 3}).flatten().tolist() == [2, 1, 0]


def test_a_complete_mapping_names_all_there_is() -> None:
    vocabulary, mapping = Vocabulary(NAMES), CompleteMapping({3: 7, 4: 0})
    assert vocabulary.indices(label_map(0, 3, 4), mapping).flatten().tolist() == [0, 2, 0]
    with pytest.raises(LabelError, match=r"holds \[7\], which the table of labels does not name"):
        vocabulary.indices(label_map(0, 3, 7), mapping)


def test_unknown_ids_are_refused_with_both_vocabularies_and_the_way_out() -> None:
    with pytest.raises(LabelError) as caught:
        Vocabulary(NAMES).indices(label_map(0, 1, 3, 4))
    message = str(caught.value)
    assert "[1, 4] are not in" in message
    assert "0: background, 3: head, 7: tail" in message
    assert "holds [0, 1, 3, 4]" in message
    assert "label_mapping={your id: generator id}" in message


def test_negative_ids_are_refused() -> None:
    with pytest.raises(LabelError, match=r"\[-1\]"):
        Vocabulary(NAMES).indices(label_map(-1, 0))


def test_a_mapping_to_an_unknown_id_is_refused_even_if_unused() -> None:
    with pytest.raises(LabelError, match=r"label_mapping leads to \[5\].*7: tail"):
        Vocabulary(NAMES).indices(label_map(0, 3), {9: 5})


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_label_maps_of_fractions_are_refused(value: float) -> None:
    with pytest.raises(LabelError, match="not integers"):
        Vocabulary(NAMES).indices(label_map(0, value, dtype=torch.float32))


def test_from_scores_takes_the_largest() -> None:
    scores = torch.tensor(np.array([[0.1, 2.0], [0.3, -1.0], [0.2, 1.9]]), dtype=torch.float32)
    assert Vocabulary(NAMES).from_scores(scores.view(1, 3, 2, 1, 1)).flatten().tolist() == [3, 0]


def test_an_image_in_place_of_a_label_map_is_called_so() -> None:
    with pytest.raises(LabelError, match="holds 300 different values: is it an image"):
        Vocabulary({0: "background", 1: "one"}).indices(torch.arange(300).view(1, 1, 3, 10, 10))
