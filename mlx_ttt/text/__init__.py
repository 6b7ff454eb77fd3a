"""From text to token ids, and from token ids to more text.

tokenizer.py     text to token ids; loads a model directory's tokenizer
detokenizer.py   token ids to text, one at a time
state.py         what a model has read: its state, in memory and in a file
decoding.py      the tokens that follow a text, with or without a draft model
visible.py       what may be shown of a text that is still being written
generation.py    all of it together: read a prompt, write what follows
"""
