"""What `make gpu` runs: checks that the tests make on a CPU, and steps of models of 1 and 8 billion numbers."""
