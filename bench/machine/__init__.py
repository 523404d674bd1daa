"""What ``bench.model`` knows: GPUs by name, and the work of every kernel."""
