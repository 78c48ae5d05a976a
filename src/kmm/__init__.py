"""kmm: a machine you can plug memory into, true to Linux 6.1."""

from kmm.errors import ConfigError, FirmwareRefused, KernelError, ValidationError
from kmm.gfp import GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT, GFP_USER
from kmm.machine import Machine
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.params import MachineConfig, NodeConfig

__all__ = [
    "GFP_ATOMIC",
    "GFP_HIGHUSER_MOVABLE",
    "GFP_KERNEL",
    "GFP_NOWAIT",
    "GFP_USER",
    "ConfigError",
    "FirmwareRefused",
    "KernelError",
    "Machine",
    "MachineConfig",
    "NodeConfig",
    "User",
    "ValidationError",
    "new_policy",
]

__version__ = "0.1.0"
