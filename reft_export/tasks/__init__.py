"""What is recorded of a decoder and of a classifier."""
