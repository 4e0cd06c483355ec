"""What generators can do."""

from typing import Literal, get_args

Verb = Literal["sample", "paint", "vary", "inpaint", "segment", "encode", "decode"]
VERBS: tuple[Verb, ...] = get_args(Verb)
