"""What the documents' figures rest on: run by hand, and never installed."""
