#!/usr/bin/env bash
# Prints the network devices for KV transfer as one NAME=value line and nothing else:
#   export $(bash scripts/get_rdma_nics.sh gpu)
# gpu     KVCACHE_RDMA_NICS=a,b        RDMA devices that are up and share a PCIe root port with a GPU; nothing when there is none
# cpu     KV_CACHE_SOCKET_IFNAME=x     the first bond that is up, else the first other interface that is up and not beside a GPU
# cpu_ib  KVCACHE_RDMA_NICS=a,b        RDMA devices of bonds that are up, else those not beside a GPU
# Reads sysfs alone. FD_SYSFS_ROOT is where it is mounted (default /sys), for tests.
set -euo pipefail
shopt -s nullglob

sysfs=${FD_SYSFS_ROOT:-/sys}

fail() {
    echo "get_rdma_nics.sh: $1" >&2
    exit "$2"
}

read_line() {
    local line=""
    [[ -r $1 ]] && read -r line <"$1" 2>/dev/null
    printf '%s' "$line"
}

# The PCIe root port above a device: the first PCI address in its path below the host bridge.
root_port() {
    local path
    path=$(readlink -f "$1") || return 0
    if [[ $path =~ /(pci[0-9a-f]+:[0-9a-f]+/[0-9a-f]+:[0-9a-f]+:[0-9a-f]+\.[0-9a-f]+) ]]; then
        printf '%s' "${BASH_REMATCH[1]}"
    fi
}

# NVIDIA's display and 3D controllers: one " root port " each.
gpu_root_ports() {
    local device
    for device in "$sysfs"/bus/pci/devices/*; do
        if [[ $(read_line "$device/vendor") == 0x10de && $(read_line "$device/class") == 0x03* ]]; then
            printf ' %s ' "$(root_port "$device")"
        fi
    done
}

beside_gpu() {
    local port
    port=$(root_port "$1")
    [[ -n $port && $gpu_ports == *" $port "* ]]
}

is_active() { # of an RDMA device: one of its ports
    local state
    for state in "$1"/ports/*/state; do
        [[ $(read_line "$state") == *ACTIVE* ]] && return 0
    done
    return 1
}

is_up() { # of a network interface
    [[ $(read_line "$1/operstate") == up ]]
}

is_bond() { [[ -d $1/bonding ]]; }

# Whether an RDMA device belongs to a bond that is up: by its own interface, or by that of a member.
in_bond() {
    local interface
    for interface in "$1"/device/net/*; do
        if is_bond "$interface" && is_up "$interface"; then
            return 0
        fi
        if [[ -e $interface/master ]] && is_bond "$interface/master" && is_up "$interface/master"; then
            return 0
        fi
    done
    return 1
}

# RDMA devices that are up, for which the command given succeeds; with commas.
rdma_devices() {
    local device names=""
    for device in "$sysfs"/class/infiniband/*; do
        if is_active "$device" && "$@" "$device"; then
            names+=",${device##*/}"
        fi
    done
    printf '%s' "${names#,}"
}

rdma_beside_gpu() { beside_gpu "$1/device"; }
rdma_apart() { ! beside_gpu "$1/device"; }

socket_interface() {
    local interface
    for interface in "$sysfs"/class/net/*; do
        if is_bond "$interface" && is_up "$interface"; then
            printf '%s' "${interface##*/}"
            return
        fi
    done
    for interface in "$sysfs"/class/net/*; do
        # Only hardware has a device; a member of a bond has no address of its own.
        if [[ -e $interface/device && ! -e $interface/master ]] && is_up "$interface" && ! beside_gpu "$interface/device"; then
            printf '%s' "${interface##*/}"
            return
        fi
    done
}

[[ $# -eq 1 ]] || fail "usage: get_rdma_nics.sh gpu|cpu|cpu_ib" 2
gpu_ports=$(gpu_root_ports)
case $1 in
gpu)
    name=KVCACHE_RDMA_NICS
    value=$(rdma_devices rdma_beside_gpu)
    ;;
cpu)
    name=KV_CACHE_SOCKET_IFNAME
    value=$(socket_interface)
    [[ -n $value ]] || fail "no network interface that is up and not beside a GPU" 1
    ;;
cpu_ib)
    name=KVCACHE_RDMA_NICS
    value=$(rdma_devices in_bond)
    [[ -n $value ]] || value=$(rdma_devices rdma_apart)
    ;;
*) fail "'$1': must be gpu, cpu or cpu_ib" 2 ;;
esac
if [[ -n $value ]]; then
    echo "$name=$value"
fi
