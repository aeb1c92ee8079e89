"""CUDA devices: runtime calls, device memory, and the record of the engines built for one."""
