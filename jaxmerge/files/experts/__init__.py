"""Mixtures of experts: made of dense models by a recipe, and brought to one layout before they are merged."""
