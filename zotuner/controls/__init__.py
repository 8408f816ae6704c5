"""Controls: tuners that nobody meta-trained, which a learned one must beat (docs/controls.md).

setting    model, task, blocks: what the commands work with
scales     G_i, C_i  ->  sigma_i; the artefact and its table
fresh      PertNNs at their random start; a scale by hand for each type of block
measure    G_i and C_i by backpropagation
groups     which blocks are perturbed together, and what each is then
calibrate  G_i and C_i by forward passes alone
commands   load, make, write
"""
