"""Aggregation of the workers' gradients in each step, without Lightning."""
