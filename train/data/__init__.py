"""Examples on disk: records, formats, TFDS versions."""
