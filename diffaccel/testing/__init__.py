"""What tests of samplers, schedulers and wrappers import, ours and those of plug-in authors."""
