"""The search for an adapter's form: layers, rank, positions, method and learning rate, in one study of many short trainings.

settings     the candidates and their grammar
gains        what a vector at a layer takes off the loss, to first order
readability  how well a linear map reads the answer from a layer
first_pass   both together: where the trials begin
costs        what an adapter costs by its form
results      trials as they ended, and the front of those that nothing beats
judgement    how good the first pass's guess was
study        optuna's storage, and how a number begins and ends in it
folder       the output folder that workers share
sweep        the sweep itself
report       what it leaves for people: report.md and report.json
plots        and its pictures
"""
