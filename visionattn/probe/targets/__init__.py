"""Probes for multi-label classification and regression, with the heads of classification."""
