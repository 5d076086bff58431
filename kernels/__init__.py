"""Fused kernels of the bottleneck; the reference operations are in `mmadapt.ops`."""
