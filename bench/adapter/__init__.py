"""The bottleneck adapter's cases, problems, providers and figures."""
