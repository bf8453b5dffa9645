"""Triton kernels of the operators, and their launchers."""

ALL_REGISTERS = {"maxnreg": 255}  # else ptxas keeps some bytes in memory to fit one program more
