"""Finished runs looked at: one (`jaxmerge analyse`), or many side by side (sweeps, `jaxmerge results`)."""
