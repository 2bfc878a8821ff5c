"""Which families go through which exporter, and at what parity.

PYTHONPATH=tests python -m evidence.support_table        runs them and writes docs/SUPPORT.md
"""
