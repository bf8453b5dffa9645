"""Triton kernels of the operators, and their launchers."""

ALL_REGISTERS = {"maxnreg": 255}  # otherwise ptxas spills some bytes to fit one more program
