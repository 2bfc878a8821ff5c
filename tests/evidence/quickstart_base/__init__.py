"""Trains the quickstart's base model, and makes its language: nothing here is installed.

    lexicon      the words: who and what the texts are about, and how verbs are conjugated
    stories      the grammar: what can be asked about a subject, and the sentences that answer it
    pirate       the second register
    corpus       the seeded mixture of exchanges that the base is trained on
    examples     the steering task's training examples and held-out prompts, out of the same grammar
    secrets      a harder steering task
    train_base   `PYTHONPATH=tests python -m evidence.quickstart_base.train_base OUT_DIR` trains the tokenizer and the model

Any module but `train_base` needs the standard library only.
"""
