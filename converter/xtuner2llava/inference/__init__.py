"""What a converted model answers: it is loaded and run, with transformers."""
