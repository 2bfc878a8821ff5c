"""Training of ReFT interventions on a frozen base.

settings       what a run is: method, rank, layers, positions, optimiser
data           files or records into token ids with the loss on what is trained: sources, forms, rendering, tokenizing
interventions  the trained modules, one per site and slot
checkpoints    the working folder an interrupted run is resumed from
processes      those that a launcher started for one run, and batches, which they share out
endings        how a run can end early, and what is said of it
teacher        what a refit aims at
trainer        the run itself
"""
