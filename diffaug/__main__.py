"""`python -m diffaug`, for launchers such as `accelerate launch -m` and torchrun."""

from diffaug.cli import app

app()
