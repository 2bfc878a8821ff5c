"""The intervention: its formulas, its op, its positions, and the adapter folder."""
