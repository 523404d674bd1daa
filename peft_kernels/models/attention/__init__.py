"""Prefix attention as an attention implementation of transformers."""
