"""What changed between checkpoints: `jaxmerge inspect` and `jaxmerge extract-lora`."""
