"""Plain PyTorch form of each operator for CPUs: `forward` and `backward`, with the operator's arguments."""
