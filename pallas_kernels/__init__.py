"""Pallas kernels for the ops of `nsa_jax`; imports jax and nothing else.

`interface` defines the arguments and results of a backend, `platforms` switches
between a backend and the implementation for other platforms, and each backend
is a folder: `triton`, `mosaic_gpu`.
"""
