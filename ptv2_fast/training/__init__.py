"""Training with Hugging Face's Trainer: methods, runs, scoring and the demo."""
