"""Joint flow: two autoencoders and one denoiser for images and their label maps together."""
