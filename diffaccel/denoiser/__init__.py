"""Hooks on the denoiser of a pipeline: what acts inside or in place of a model call."""
