"""Training: exact gradients of texts of any length, in memory that does not grow with them.

segments.py      gradients, segment by segment
data.py          files become documents, and documents batches
tokenizer.py     trains a SentencePiece tokenizer
presets.py       sizes and learning rates of the paper
optimizer.py     the optimizer, its schedule, what decays
loop.py          the steps of a training
run.py           a training and its folder, from the first step or from a checkpoint
checkpoint.py    checkpoints, written whole or not at all
report.py        progress, log and plot
lora.py          mlx-lm's fine-tuning, with our gradients
distributed.py   loss and gradients, summed over machines
evaluate.py      the loss of each token of a text, and by position with intervals
needle.py        the needle test: a made-up name and number, asked for later
"""

from .segments import gradients

__all__ = ["gradients"]
