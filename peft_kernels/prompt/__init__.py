"""Prompt tuning: embeddings, mask, labels and positions with a trained prompt, in one launch."""
