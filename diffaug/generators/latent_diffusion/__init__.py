"""Latent diffusion with MONAI's networks: their sizes, the model, and autoencoders in slabs."""
