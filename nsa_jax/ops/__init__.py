"""The public ops: validate, choose an implementation, call it.

What is the same for every implementation happens here, once: defaults,
positions of the queries, and the removal of everything that no query may read
(padding, keys after the last query), so that a NaN there reaches no result.
"""
