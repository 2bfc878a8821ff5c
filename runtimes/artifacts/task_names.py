"""What a base does with a text; a bundle's manifest says which, and runtimes/tasks/task.py what follows from it on a device."""

TEXT_GENERATION = "text-generation"
"""A decoder: tokens, and a KV cache, to the logits of the next token."""
TEXT_CLASSIFICATION = "text-classification"
"""An encoder with a classification head: a text, or a pair of texts, to the logits of its labels."""
