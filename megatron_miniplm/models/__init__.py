"""Floor 3: families, parameter tables, model building, checkpoints, the head."""
