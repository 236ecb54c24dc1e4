"""Floor 4: hidden states and labels to a loss; one file an objective."""
