"""nnU-Net: trainers that draw from banks or vary on the GPU, and what prepares a dataset for them."""
