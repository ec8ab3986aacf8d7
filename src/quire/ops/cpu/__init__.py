"""The `cpu` back end: C++ kernels (`csrc/`), chosen by instruction set when an engine is built."""
