"""What several tests use: tiny models and files, fakes of outside services, programs that die when told to."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
"""The checkout."""
