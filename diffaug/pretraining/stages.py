"""Pretraining by name: what each method trains and optimises, and which weights it leaves."""

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor, nn

from diffaug.errors import DiffaugError
from diffaug.pretraining.loading import Loaded, load_pretrained
from diffaug.pretraining.masked import Masked
from diffaug.pretraining.swin import Swin, SwinSelfSupervised, turning_plane
from diffaug.segmentation.networks import NetworkPlan, build_network, is_head
from diffaug.segmentation.patches import Patches
from diffaug.segmentation.training import Objective, Schedule, Segmentation

Method = Literal["supervised", "masked", "swin"]


def check_method(method: Method, plan: NetworkPlan, patch: tuple[int, int, int]) -> None:
    """Refuse a method that does not suit a network or its patch.

    Raises:
        DiffaugError: names what suits.
    """
    if method == "swin":
        if plan.kind != "swinunetr":
            raise DiffaugError(f"the method swin pretrains a swinunetr, not a {plan.kind}: take masked")
        turning_plane(patch)


def trained_network(method: Method, plan: NetworkPlan, channels: int, classes: int, seed: int) -> nn.Module:
    """What a method trains, with random weights. Tensors have the names that they have in the network."""
    outputs = classes if method == "supervised" else channels
    network = build_network(plan, channels, outputs, seed=seed)
    return SwinSelfSupervised(network.swinViT, channels) if method == "swin" else network


def objective(method: Method, patches: Patches, classes: int, schedule: Schedule) -> Objective:
    """What a method optimises."""
    if method == "supervised":
        return Segmentation(patches, classes, schedule)
    unlabelled = replace(patches, labelled=False)
    return Swin(unlabelled) if method == "swin" else Masked(unlabelled, schedule)


def hand_over(
    network: nn.Module, plan: NetworkPlan, weights: dict[str, Tensor], method: Method, following: Method
) -> Loaded:
    """Fill what the following method trains with what a method left; the last layer only where both have
    labels."""
    if method == following:
        return load_pretrained(network, weights)
    why = "the last layer, which is another one"
    return load_pretrained(network, weights, skip=partial(is_head, plan), why=why)
