"""Layers around the ops: projections, RoPE, phi, gates, decode cache.

`core` has all that no module system is needed for, `linen` the Flax modules.
"""
