"""Segmentation probes: each patch token of a frozen backbone says the class of its pixels."""
