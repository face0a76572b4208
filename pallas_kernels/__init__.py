"""Pallas kernels of the ops of `nsa_jax`; imports jax and nothing else.

`interface` says what a backend is given, `platforms` chooses between it and
what runs elsewhere, and each backend is a folder: `triton`.
"""
