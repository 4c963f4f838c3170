"""Triton's own just-in-time compiler, for sm_90, with a driver that loads and launches nothing.

A kernel is specialised, compiled to machine code and handed to a launcher as on a device; what the
launcher would refuse, a grid of more programs than fit, is asserted.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

PROCESSORS = 132
#: (name, grid, whether it is cooperative) of each launch.
LAUNCHES = []


class Launcher:
    def __init__(self, source, metadata):
        self.name, self.metadata = source.fn.__name__, metadata

    def __call__(self, x, y, z, stream, function, *rest):
        together = bool(self.metadata.launch_cooperative_grid)
        assert not together or x * y * z <= PROCESSORS, (self.name, x, y, z)
        LAUNCHES.append((self.name, (x, y, z), together))


class Utils:
    def load_binary(self, name, kernel, shared, device):
        """module, function, registers, spilled bytes, threads a program may have"""
        assert kernel and shared <= 232448, (name, shared)
        return 1, 2, 128, 0, 1024

    def get_device_properties(self, device):
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": PROCESSORS,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }


class Driver(DriverBase):
    launcher_cls = Launcher

    def __init__(self):
        self.utils = Utils()
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, name):
        return name

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return None


def activate():
    triton.runtime.driver.set_active(Driver())
