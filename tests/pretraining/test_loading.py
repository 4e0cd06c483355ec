"""Partial loading says what was loaded, what not, and why."""

import pytest
import torch
from torch import nn

from diffaug.errors import DiffaugError
from diffaug.pretraining.loading import load_pretrained, tensors
from diffaug.pretraining.stages import hand_over
from diffaug.segmentation.networks import NetworkPlan, build_network

PLAN = NetworkPlan(settings={"filters": [4, 8, 16]})


def test_a_whole_network_is_loaded_under_all_its_names() -> None:
    trained, fresh = (build_network(PLAN, 1, 3, seed=seed) for seed in range(2))
    found = load_pretrained(fresh, tensors(trained))
    assert not found.left_out
    assert not found.unused
    state, wanted = fresh.state_dict(), trained.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    # A whole state dict, in which this network has tensors twice, leaves nothing unused.
    assert not load_pretrained(build_network(PLAN, 1, 3), wanted).unused


def test_what_does_not_fit_is_named() -> None:
    trained = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 4), "c": nn.Linear(1, 1)})
    network = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 5), "d": nn.Linear(1, 1)})
    with pytest.warns(UserWarning, match=r"most likely is not the one of plan.json: loaded 1 of 6"):
        found = load_pretrained(network, tensors(trained), skip=lambda name: name == "a.bias", why="asked")
    assert found.loaded == ("a.weight",)
    assert "of another shape: b.weight (shape (4, 3), not (5, 3))" in str(found)
    assert found.left_out["a.bias"] == "asked"
    assert found.left_out["b.weight"] == "shape (4, 3), not (5, 3)"
    assert found.left_out["d.weight"] == "not among the weights"
    assert set(found.unused) == {"c.weight", "c.bias"}
    assert "loaded 1 of 6 tensors" in str(found)
    assert torch.equal(network["a"].weight, trained["a"].weight)


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(DiffaugError, match="none of the weights fits"):
        load_pretrained(nn.Linear(2, 3), {"other": torch.zeros(1)})


def test_heads_go_along_only_between_labels() -> None:
    masked = build_network(PLAN, 1, 1, seed=0)
    labelled = build_network(PLAN, 1, 3, seed=1)
    found = hand_over(labelled, PLAN, tensors(masked), "masked", "supervised")
    assert set(found.left_out) == {name for name in tensors(labelled) if name.startswith("output_block.")}
    pairs = build_network(PLAN, 1, 3, seed=2)
    assert not hand_over(labelled, PLAN, tensors(pairs), "supervised", "supervised").left_out
