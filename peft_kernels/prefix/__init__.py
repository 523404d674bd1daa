"""Prefix-concatenated attention: a learned prefix in front of keys and values, never copied."""
