"""Says what is assumed of devices and links that nobody has measured, so that something can be predicted of them."""

from placement.measured.speed import DeviceSpeed
from placement.model.specs import DeviceSpec

THREAD_BYTES_PER_S, MOST_CPU_BYTES_PER_S = 8e9, 100e9
"""What a thread reads in a second where memory is far from full speed, and what a CPU reads with many of them."""
THREAD_FLOPS_PER_S = 40e9
GPU_BYTES_PER_S, GPU_FLOPS_PER_S = 1.5e12, 150e12
LINK_BYTES_PER_S = 1.25e9
"""A network interface of 10 Gbit/s."""
LOCAL_BYTES_PER_S = 4e9
"""What passes between processes of one machine."""
ROUND_TRIP_S, LOCAL_ROUND_TRIP_S = 100e-6, 50e-6


def assumed_speed(device: DeviceSpec) -> DeviceSpeed:
    """Returns the speed that is assumed of a device."""
    if device.kind == "cuda":
        return DeviceSpeed(weight_bytes_per_s=GPU_BYTES_PER_S, flops_per_s=GPU_FLOPS_PER_S)
    return DeviceSpeed(
        weight_bytes_per_s=min(device.num_threads * THREAD_BYTES_PER_S, MOST_CPU_BYTES_PER_S),
        flops_per_s=device.num_threads * THREAD_FLOPS_PER_S,
    )
