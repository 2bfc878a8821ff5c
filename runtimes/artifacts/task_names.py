"""What a base does with a text; a bundle's manifest says which."""

TEXT_GENERATION = "text-generation"
"""A decoder: tokens, and a KV cache, to the logits of the next token."""
TEXT_CLASSIFICATION = "text-classification"
"""An encoder with a classification head: a text, or a pair of texts, to the logits of its labels."""

HEAD_PREFIX = "reft.head."
"""Overridable initializers of a classifier's graph: the head's parameters, ``reft.head.<parameter name>``."""
