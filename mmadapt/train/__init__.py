"""The small training loop, its flags, and frozen features kept on disk."""
