"""Examples in, tuned weights out (`jaxmerge sft`)."""
