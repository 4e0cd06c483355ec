"""Pretraining by name: what each method optimises, and which weights it leaves."""

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor, nn

from diffaug.pretraining.loading import Loaded, load_pretrained
from diffaug.pretraining.masked import Masked
from diffaug.segmentation.networks import NetworkPlan, is_head
from diffaug.segmentation.patches import Patches
from diffaug.segmentation.training import Objective, Schedule, Segmentation

Method = Literal["supervised", "masked"]


def outputs(method: Method, channels: int, classes: int) -> int:
    """Output channels of the network that a method trains."""
    return classes if method == "supervised" else channels


def objective(method: Method, patches: Patches, classes: int, schedule: Schedule) -> Objective:
    """What a method optimises."""
    if method == "supervised":
        return Segmentation(patches, classes, schedule)
    return Masked(replace(patches, labelled=False), schedule)


def hand_over(
    network: nn.Module, plan: NetworkPlan, weights: dict[str, Tensor], method: Method, following: Method
) -> Loaded:
    """Fill a network with what a method left; the last layer only where both have labels."""
    if method == following == "supervised":
        return load_pretrained(network, weights)
    why = "the last layer, which is another one"
    return load_pretrained(network, weights, skip=partial(is_head, plan), why=why)
