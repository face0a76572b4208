"""Language models built from the layers: configuration and Flax modules."""
