"""What machines can do, from their vendors' data sheets: the ground that MFU and predictions stand on."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What a rank computes with, and what it reaches others through."""

    name: str
    flops: float
    """Dense matrix products a second: bfloat16 on GPUs."""
    memory_bytes: int
    link_bytes: float
    """A second, in one direction, between devices of a node."""
    network_bytes: float
    """A second, in one direction, of a device's share of the node's network."""
    latency_seconds: float = 10e-6
    """Of a collective, for each doubling of its ranks."""
    overlaps: bool = True
    """Transfers of shards go on while it computes."""

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


HOST_BYTES = 4e9
"""A second, at which ranks of a CPU hand each other their pieces through memory."""
_NVLINK_3, _NVLINK_4, _NVLINK_5, _PCIE_4 = 300e9, 450e9, 900e9, 32e9
_NETWORK_200, _NETWORK_400 = 25e9, 50e9
DEVICES = {
    device.name: device
    for device in (
        Device("A100", 312e12, 80 * GIB, _NVLINK_3, _NETWORK_200),
        Device("H100", 989e12, 80 * GIB, _NVLINK_4, _NETWORK_400),
        Device("GH200", 989e12, 96 * GIB, _NVLINK_4, _NETWORK_400),
        Device("H200", 989e12, 141 * GIB, _NVLINK_4, _NETWORK_400),
        Device("B200", 2250e12, 180 * GIB, _NVLINK_5, _NETWORK_400),
        Device("L40S", 362e12, 48 * GIB, _PCIE_4, _NETWORK_200),
    )
}
"""GPUs by a word in the name that they give themselves; one network adapter of 200 or 400 Gbit/s for each is assumed."""


def known_device(name: str) -> Device | None:
    """The device whose word is in a name; the longest where several are ("GH200" holds "H200")."""
    found = [device for word, device in DEVICES.items() if word in name]
    return max(found, key=lambda device: len(device.name), default=None)


def cpu_device(flops: float) -> Device:
    """A rank of a CPU that makes so many products a second, as it was measured; nothing is done while it transfers."""
    return Device("cpu", flops, 0, HOST_BYTES, HOST_BYTES, latency_seconds=1e-4, overlaps=False)
