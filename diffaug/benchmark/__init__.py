"""The benchmark of Dice gains: arms, seeds, and what they say about each other."""
