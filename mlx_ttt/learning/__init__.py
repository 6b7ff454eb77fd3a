"""What a model learns while it reads, and how it is steered.

observation.py   what is learned from each token, and how much it surprises
states.py        arithmetic of states: how far they have come, blended, reset, swapped, scaled, frozen
"""
