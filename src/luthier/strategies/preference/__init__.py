"""Which of two answers is better, or whether one is any good."""
