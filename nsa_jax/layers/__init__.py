"""Layers around the ops: projections, RoPE, phi, gates, decode cache.

`core` is independent of the module system; `linen` has the Flax modules.
"""
