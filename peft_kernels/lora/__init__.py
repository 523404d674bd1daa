"""LoRA: base product plus low-rank update in one launch."""
