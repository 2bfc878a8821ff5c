"""The reference: an adapter's edits in eager PyTorch."""
