"""The bottleneck's forward pass in CUDA C++ for clusters of thread blocks, compiled on first use."""
