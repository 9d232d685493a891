"""Training on inputs that were made harder."""
