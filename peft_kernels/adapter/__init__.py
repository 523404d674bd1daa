"""The bottleneck adapter: down, activation, up and residual in one launch."""
