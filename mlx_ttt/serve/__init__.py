"""What mlx-lm's server needs to serve TTT models.

prompt_store.py   finds the state of an earlier text with which a request begins
"""
