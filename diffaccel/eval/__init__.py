"""Images in, numbers out; knows nothing of samplers."""
