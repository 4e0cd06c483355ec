"""Checkpoints of MONAI's bundles, of MAISI and of NV-Generate, into a generator.

Their networks are MONAI's own classes. Sizes come from a bundle's configuration, or are those of the
published networks; grids, units and licences, which no file states, are those of a template.
"""

from diffaug.zoo.monai.importing import import_maisi, import_monai_bundle
from diffaug.zoo.monai.templates import MAISI, TEMPLATES

__all__ = ["MAISI", "TEMPLATES", "import_maisi", "import_monai_bundle"]
