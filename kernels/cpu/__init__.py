"""Operations compiled for CPUs."""
