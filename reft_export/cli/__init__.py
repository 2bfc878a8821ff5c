"""The command line: one module per verb, each importing its room only when the verb runs."""
