"""Files into a bundle."""
