"""The bottleneck adapter."""
