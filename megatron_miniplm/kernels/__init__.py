"""Floor 1: arithmetic on one shard of logits; no collectives, no models."""
