"""Figures of the chips that programs are planned for. No JAX."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What a chip has and does at most."""

    name: str
    kind: str  # how `device_kind` begins
    memory: int  # bytes
    reserved: int  # bytes of it that no program gets
    bandwidth: float  # bytes per second from and to memory
    flops: float  # per second, matrix products in bfloat16
    link: float  # bytes per second that it sends to other chips, over all links

    def share(self, devices_per_chip: int) -> "Chip":
        """The part of a chip that one of its devices is: TPU7x has two, and so has TPU v4 when compiled for ahead."""
        n = devices_per_chip
        return self._replace(
            memory=self.memory // n,
            reserved=self.reserved // n,
            bandwidth=self.bandwidth / n,
            flops=self.flops / n,
            link=self.link / n,
        )


# TPUs: https://docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e, tpu7x, key specifications (the two-way bandwidth of
# the interconnect there is halved here: what a chip sends). Reserved: what libtpu 0.0.42 does not grant; of a v5p it
# grants more than the documented 95 GiB. H100, H200: https://www.nvidia.com/en-us/data-center/h100/ and h200/, SXM,
# dense, NVLink halved. RTX 4080: NVIDIA's whitepaper on Ada, dense, summed in float32; the link is PCIe 4.0 x16. The
# first whose kind fits counts.
CHIPS = (
    Chip("v5e", "TPU v5 lite", 16 * GIB, GIB // 4, 819e9, 197e12, 200e9),
    Chip("v6e", "TPU v6 lite", 32 * GIB, 3 * GIB // 4, 1638e9, 918e12, 400e9),
    Chip("v5p", "TPU v5", 95 * GIB, 0, 2765e9, 459e12, 600e9),
    Chip("v4", "TPU v4", 32 * GIB, 3 * GIB // 2, 1228e9, 275e12, 300e9),
    Chip("tpu7x", "TPU7x", 192 * GIB, 5 * GIB // 2, 7380e9, 2307e12, 600e9),
    Chip("h100", "NVIDIA H100", 80 * GIB, GIB, 3350e9, 989e12, 450e9),
    Chip("h200", "NVIDIA H200", 141 * 10**9, GIB, 4800e9, 989e12, 450e9),
    Chip("rtx4080", "NVIDIA GeForce RTX 4080", 16 * GIB, GIB // 2, 717e9, 97.5e12, 32e9),
)
TPUS = tuple(chip.name for chip in CHIPS if chip.kind.startswith("TPU"))
GPUS = {chip.name: chip for chip in CHIPS if chip.name not in TPUS}


def chip_of(kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS if kind.startswith(chip.kind)), None)
