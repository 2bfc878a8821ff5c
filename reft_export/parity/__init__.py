"""Golden arrays, the ladders that are held against them, and the gate."""
