"""Crash-safe files: safetensors, checksums, staged directories, checkpoints. Knows no LoRA."""
