"""What is left of the steering: checkers, perplexity, and the report of both."""
