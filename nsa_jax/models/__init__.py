"""Language models of the layers: configuration and Flax modules."""
