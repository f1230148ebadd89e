"""scripts/get_rdma_nics.sh against made-up sysfs trees."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "get_rdma_nics.sh"


@dataclass(frozen=True)
class Card:
    """A PCI card below a root port: a GPU, or a network card with an interface and maybe an RDMA device."""

    port: str
    interface: str = ""
    rdma: str = ""
    up: bool = True
    master: str = ""


def make_sysfs(root: Path, cards: list[Card], bonds: dict[str, bool]) -> None:
    for folder in ("bus/pci/devices", "class/net", "class/infiniband"):
        (root / folder).mkdir(parents=True)
    for name, up in bonds.items():
        bond = root / "devices/virtual/net" / name
        (bond / "bonding").mkdir(parents=True)
        (bond / "operstate").write_text("up\n" if up else "down\n")
        (root / "class/net" / name).symlink_to(bond)
    for number, card in enumerate(cards, 1):
        address = f"0000:{number:02x}:00.0"
        device = root / f"devices/pci0000:{card.port}/0000:{card.port}:01.0/0000:f0:00.0" / address
        device.mkdir(parents=True)
        (root / "bus/pci/devices" / address).symlink_to(device)
        is_gpu = not card.interface and not card.rdma
        (device / "vendor").write_text("0x10de\n" if is_gpu else "0x15b3\n")
        (device / "class").write_text("0x030200\n" if is_gpu else "0x020000\n")
        if card.interface:
            folder = device / "net" / card.interface
            folder.mkdir(parents=True)
            (folder / "operstate").write_text("up\n" if card.up else "down\n")
            (folder / "device").symlink_to(device)
            if card.master:
                (folder / "master").symlink_to(root / "devices/virtual/net" / card.master)
            (root / "class/net" / card.interface).symlink_to(folder)
        if card.rdma:
            folder = device / "infiniband" / card.rdma
            (folder / "ports/1").mkdir(parents=True)
            (folder / "ports/1/state").write_text("4: ACTIVE\n" if card.up else "1: DOWN\n")
            (folder / "device").symlink_to(device)
            (root / "class/infiniband" / card.rdma).symlink_to(folder)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FD_SYSFS_ROOT": str(root)}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


EIGHT_GPUS = [Card(port=f"{i}a") for i in range(8)] + [
    *[Card(port=f"{i}a", interface=f"ens{i}np0", rdma=f"mlx5_{i}") for i in range(8)],
    Card(port="9a", interface="eno1", rdma="mlx5_8"),
]
BOND = {"bond0": True}
MEMBERS = [Card(port="8a", interface=f"ens9f{i}np{i}", rdma=f"mlx5_bond_{i}", master="bond0") for i in range(2)]


@pytest.mark.parametrize(
    ("cards", "bonds", "mode", "printed"),
    [
        (EIGHT_GPUS, {}, "gpu", "KVCACHE_RDMA_NICS=" + ",".join(f"mlx5_{i}" for i in range(8)) + "\n"),
        (EIGHT_GPUS, {}, "cpu", "KV_CACHE_SOCKET_IFNAME=eno1\n"),
        (EIGHT_GPUS, {}, "cpu_ib", "KVCACHE_RDMA_NICS=mlx5_8\n"),
        (EIGHT_GPUS + MEMBERS, BOND, "cpu", "KV_CACHE_SOCKET_IFNAME=bond0\n"),
        (EIGHT_GPUS + MEMBERS, BOND, "cpu_ib", "KVCACHE_RDMA_NICS=mlx5_bond_0,mlx5_bond_1\n"),
        (EIGHT_GPUS + MEMBERS, {"bond0": False}, "cpu", "KV_CACHE_SOCKET_IFNAME=eno1\n"),
        ([Card(port="1a"), Card(port="1a", interface="ibs1", rdma="mlx5_0")], {}, "gpu", "KVCACHE_RDMA_NICS=mlx5_0\n"),
        ([Card(port="1a"), Card(port="1a", rdma="mlx5_0", up=False)], {}, "gpu", ""),
        ([Card(port="1a"), Card(port="2a", interface="enp2s0", rdma="mlx5_0")], {}, "gpu", ""),
        ([Card(port="1a"), Card(port="2a", interface="enp2s0")], {}, "cpu_ib", ""),
        ([Card(port="2a", interface="eth0")], {}, "gpu", ""),
        (
            [Card(port="2a", interface="eth0", up=False), Card(port="2a", interface="eth1")],
            {},
            "cpu",
            "KV_CACHE_SOCKET_IFNAME=eth1\n",
        ),
        ([], {}, "gpu", ""),
        ([], {}, "cpu_ib", ""),
    ],
)
def test_only_the_line_is_printed(
    tmp_path: Path, cards: list[Card], bonds: dict[str, bool], mode: str, printed: str
) -> None:
    make_sysfs(tmp_path, cards, bonds)
    done = run(tmp_path, mode)
    assert (done.stdout, done.stderr, done.returncode) == (printed, "", 0)


def test_failures_say_why_and_print_nothing_else(tmp_path: Path) -> None:
    make_sysfs(tmp_path, [Card(port="1a"), Card(port="1a", interface="eth0")], {})
    done = run(tmp_path, "cpu")
    assert (done.stdout, done.returncode) == ("", 1)
    assert "no network interface that is up" in done.stderr
    for arguments in ((), ("tpu",), ("gpu", "cpu")):
        done = run(tmp_path, *arguments)
        assert (done.stdout, done.returncode) == ("", 2)
        assert "gpu" in done.stderr
