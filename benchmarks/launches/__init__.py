"""How many kernels MLX launches on a Mac's GPU for a decoded token, counted without a Mac: see README.md.

graph.py        the graph that a GPU would get, recorded
fusion.py       what mx.compile makes of it
rules.py        what MLX launches for each operation, with the places in its sources
arrays.py       how arrays lie in memory, which the rules depend on
gpus.py         M1, M4 Max, M5, which the rules depend on, too
evaluation.py   in what order operations run, and whose memory is free by then
decoding.py     our models, and those of mlx-lm, as graphs of one token
count.py        launches of a layer, and around the layers
report.py       the tables
"""
