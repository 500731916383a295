"""Adapters merged with adapters: recipes with the key `adapter`, whose result is an adapter too."""
