"""Segmentation probes: the class of each pixel is predicted from the patch tokens of a frozen backbone."""
