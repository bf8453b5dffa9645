"""Probes of several labels, or of numbers, of each image, by the heads of classification."""
