"""``python -m peft_kernels demo``: trains on real digits, eager against fused."""
