"""Ways of asking, one file for each."""
