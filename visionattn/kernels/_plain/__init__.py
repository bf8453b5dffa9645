"""The form of each operator in plain PyTorch that CPUs run: `forward` and `backward`, arguments as of the operator."""
