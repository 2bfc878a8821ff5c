"""Which token is edited, computed in the graph."""
