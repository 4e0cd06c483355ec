"""Pretraining of segmentation networks: on pairs of image and label map, or on images alone."""
