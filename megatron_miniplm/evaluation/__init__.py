"""Floor 5: what is said about finished runs: reports and plots."""
