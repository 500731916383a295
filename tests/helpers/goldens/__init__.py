"""Values made by other programs, and how they were made."""

import pathlib

GOLDENS = pathlib.Path(__file__).parent
