"""Which families go through which exporter, and at what parity: ``python -m reft_export.support_table`` runs them and writes the page."""
