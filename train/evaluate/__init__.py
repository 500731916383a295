"""What a model can do, and what training changed in it (`jaxmerge evaluate`, `harness`): looks, changes nothing."""
