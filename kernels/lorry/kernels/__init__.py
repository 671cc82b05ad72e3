"""The arithmetic of the engine: references, Triton kernels and the layout of pages."""
