"""What training and evaluation measure: luma of super-resolution, errors of matching, ranking."""
