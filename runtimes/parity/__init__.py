"""Figures, golden arrays and perplexity: what parity is measured by."""
