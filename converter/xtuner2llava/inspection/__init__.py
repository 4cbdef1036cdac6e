"""What a checkpoint or a training config is, and what it can become."""
