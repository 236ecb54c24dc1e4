"""Floor 3: from scores to the instances that are kept."""
