"""A model as something that an app can run.

The exported network is described once, over an abstract set of operations:

    operations.py   the operations that a lowering provides
    numbers.py      number types and constants
    elementwise.py  norms and activations
    layout.py       the state, packed into one array
    weights.py      the model's parameters as the network wants them
    calls.py        what differs between `decode` and `prefill`
    rule.py         the update rule, for any inner model
    network.py      a block: convolution, TTT layer, SwiGLU
    functions.py    `decode` and `prefill`, from token ids to logits

A lowering turns the description into something that runs. It is a set of operations, a way to declare inputs, state and
outputs, and a way to package the result:

    mil/            Core ML
    coreai/         Core AI

What all lowerings share:

    metadata.py     what a package says of itself
    session.py      reading a text through both functions
    verify.py       a package's answers beside the model's
    companions/     what an app needs beside a package
    errors.py       other libraries' failures in one line
"""
