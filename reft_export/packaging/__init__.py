"""``reft-export package``: what a device without a network is given."""
