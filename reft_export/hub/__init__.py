"""Adapters and bundles on a Hugging Face hub: pushed with a card, and pulled back bit for bit."""
