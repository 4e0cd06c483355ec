"""Pretraining of segmentation networks: on pairs of image and label map, or on images alone."""

from diffaug.pretraining.loading import Loaded, load_pretrained
from diffaug.pretraining.pretrain import read_weights

__all__ = ["Loaded", "load_pretrained", "read_weights"]
