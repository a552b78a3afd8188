"""The ops on CPUs: C++ in ``source``, compiled on first use; plain PyTorch where it cannot be."""
