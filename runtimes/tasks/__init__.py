"""How a decoder and a classifier are held against their golden arrays."""
