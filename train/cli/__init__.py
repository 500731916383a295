"""The command `jaxmerge`: words in, one program called, an exit code out."""
