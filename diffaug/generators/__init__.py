"""Generators: their verbs, grid, intensity and label maps, networks and samplers."""
