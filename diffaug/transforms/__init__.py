"""The generator's verbs as transforms.

- Plug-ins, one for each framework: `torchio`, `monai`, `batchgenerators`, and `batch` for tensors on a
  device.
- What they share: `operations` (what is drawn and applied), with `regions`, `deformation` and `case`;
  `sources` finds generators, `one_grid` and `guard` check what is given.
- `bank` and `bank_building`: variations made ahead of training.
"""
