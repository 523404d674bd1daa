"""LoRA's cases, problems, baselines and figures."""
