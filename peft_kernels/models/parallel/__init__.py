"""Tensor parallelism of LoRA layers."""
