"""Which families go through which exporter, and at what parity: ``python -m reft_export.support_table`` runs them all and writes the page."""
