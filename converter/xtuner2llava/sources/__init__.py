"""The layouts that XTuner and Hugging Face write, opened as lazy tensors."""
