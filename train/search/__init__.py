"""Solutions looked for step by step (`jaxmerge search`): by itself, or as the samples of a round."""
