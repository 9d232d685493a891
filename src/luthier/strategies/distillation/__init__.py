"""Learning from what another model answers."""
