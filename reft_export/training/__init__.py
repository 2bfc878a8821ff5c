"""Training of ReFT interventions on a frozen base.

settings       what a run is: method, rank, layers, positions, optimiser
data           files or records into token ids with the loss on what is trained: sources, forms, rendering, tokenizing
interventions  the trained modules, one per site and slot
checkpoints    the working folder an interrupted run is resumed from
teacher        what a refit aims at
trainer        the run itself
"""
