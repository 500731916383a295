"""The self-improvement loop (`jaxmerge improve`): plan, phases, commit; everything that is of a round."""
