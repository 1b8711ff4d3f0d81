"""The architectures: one file each, one row each in `rwkv.MIXERS`."""
