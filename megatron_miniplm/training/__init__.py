"""Floor 5: the training loop, its optimizer, telemetry and resume."""
