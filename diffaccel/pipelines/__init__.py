"""What a user wraps a whole pipeline with."""
