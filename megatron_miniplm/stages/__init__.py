"""Floor 6: one file per verb: Config in, artifact out."""
