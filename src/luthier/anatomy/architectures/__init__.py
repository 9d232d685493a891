"""What no inference can know about an architecture; one file each. Asked for by model type, never imported by name."""
