"""Where the streams of a graph are, and a reason for every one that is not found."""
