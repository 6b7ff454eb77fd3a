"""What a machine has, and whether what it runs is right.

facts.py    what is there, what is missing and what it would bring
checks.py   every backend of this machine against the definition; Core ML against MLX; speed
"""
