"""The operations for CUDA devices, in Triton. Nothing is imported here, since Triton is installed only beside a GPU."""
