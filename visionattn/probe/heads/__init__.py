"""Probing heads: poolings, banks of heads, their training and results."""
