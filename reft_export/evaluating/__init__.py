"""The same table of quality for a base and its adapters: eager PyTorch, bundles and engines, on one file of held-out lines."""
