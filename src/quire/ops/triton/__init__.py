"""Ops as Triton kernels, for CUDA, ROCm and XPU; on a CPU by Triton's interpreter, which is how they are tested.

`kernels/` has what runs on the device; the modules here choose shapes and launch. Nothing here is imported before a
target is served by it: Triton takes long to import.
"""
