"""Low rank inside fixed directions: those of the weight itself, or those drawn once for the whole model."""
