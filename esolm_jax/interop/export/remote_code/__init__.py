"""Files that an exported folder runs in `transformers`. They need torch, transformers and numpy.

They are copied, never imported."""
