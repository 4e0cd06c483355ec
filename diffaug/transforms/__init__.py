"""The generator's verbs as transforms: `variation` is what they share, `torchio` the plug-in for TorchIO."""
