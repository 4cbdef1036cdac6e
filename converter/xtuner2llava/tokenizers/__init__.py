"""Tokenizers as files: read, edited, and converted without transformers and without remote code."""
