"""Medical Diffusion (Khader et al., arXiv 2211.03364): VQ-GAN, factorised U-Net, and the model of both."""
