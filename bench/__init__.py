"""Benchmarks of peft_kernels: cases, baselines, numerics gate, timers, reports."""
