"""Words to tokens."""
