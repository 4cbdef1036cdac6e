"""XTuner's training config, read as data."""
