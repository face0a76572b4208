"""Kernels written in Pallas, for the Triton backend.

What belongs here: differentiable entry points over raw arrays, their kernels
and the tile sizes they run with. The package imports jax and nothing else;
validation, the choice of an implementation and everything that knows about
layers or models live in `nsa_jax`, which is the only user of this package.
"""
