"""One window over many ranks, and the engines that shard weights."""
