"""Kernels for NVIDIA GPUs, each with its oracle in ``ops/oracle.py``."""
