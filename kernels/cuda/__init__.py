"""Operations for CUDA devices, written in Triton. Nothing is imported here: Triton is there only where a GPU is."""
