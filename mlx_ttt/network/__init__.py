"""The paper in plain MLX: the network, its TTT layers, their state and the update rule. No device, no C, no
compilation.

args.py        what a config.json says
model.py       from token ids to logits: the model, its blocks, the TTT layer
inner.py       the inner models, TTT-Linear and TTT-MLP
rule.py        the update rule's three arguments: tokens, learner, state
dual.py        the update rule, in its dual form
reference.py   the update rule by its definition, for tests
cache.py       what a layer remembers of a text
rewind.py      the same, with tokens that can be taken back
operations.py  norms, activations and convolutions
backend.py     what of all this a backend may compute in its own way
"""
