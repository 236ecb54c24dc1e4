"""Floor 0: errors, logging, configuration, manifests, registries. Imports nothing of ours."""
