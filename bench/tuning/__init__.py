"""What ``bench.tune`` and ``bench.tiles`` share: launches, candidates for their tiles, trials."""
