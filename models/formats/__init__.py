"""Checkpoint formats: reads Hugging Face, Flax (orbax), GGUF and LoRA adapters; writes Hugging Face and PEFT folders."""
