"""Banks: variations of a dataset's cases, made ahead of training (`building`) and drawn from it (`bank`)."""

from diffaug.bank.bank import Bank, open_bank
from diffaug.bank.building import build_bank

__all__ = ["Bank", "build_bank", "open_bank"]
