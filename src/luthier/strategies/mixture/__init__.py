"""Which rows make a step, and how much each set of rows counts."""
