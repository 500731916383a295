"""The decoder, its loss and its files; a model from anything that holds one."""
