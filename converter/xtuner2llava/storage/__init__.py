"""File formats as byte ranges: torch zip files, pickles, safetensors, JSON. Knows no XTuner."""
