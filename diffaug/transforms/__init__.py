"""The operations and the bank as transforms, one file for each framework.

`torchio`, `monai`, `batchgenerators`, and `batch` for tensors on a device.
"""
