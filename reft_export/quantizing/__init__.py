"""A bundle's weights and activations to fewer bits; calibration, refits and swaps."""
