"""Kernels for the Triton backend of Pallas."""
