"""File formats as byte ranges: torch zip files, pickles, safetensors, JSON; no XTuner layouts."""
