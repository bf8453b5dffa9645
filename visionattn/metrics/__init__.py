"""Metrics of training and evaluation: luma PSNR, matching errors, ranking, segmentation, label and value prediction."""
