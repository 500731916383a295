"""What a run wrote, as a page: this folder reads files and computes nothing."""
