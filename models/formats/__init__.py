"""Checkpoint formats: Hugging Face, Flax, GGUF and LoRA adapters, read into and written from the stacked parameter tree."""
