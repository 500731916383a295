"""Prompts in, samples out (`jaxmerge sample`)."""
