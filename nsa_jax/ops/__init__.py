"""The public ops: they validate, choose an implementation and call it.

Work that every implementation shares is done here, once: defaults, query
positions, and the masking of everything that no query may read (padding, keys
after the last query), so that a NaN there reaches no result.
"""
