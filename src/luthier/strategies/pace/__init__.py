"""Which numbers learn how fast, and when."""
