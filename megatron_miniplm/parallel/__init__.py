"""Floor 1: who is where, the collectives, and the CPU platform."""
