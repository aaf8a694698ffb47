"""What is wrong with a cluster, most serious first, each with what mends it.

First what keeps a job from running at all, then what slows it, then what may.
"""

from mlxtp.doctor import host_faults, network_faults
from mlxtp.doctor.findings import Fault, Findings


def faults(found: Findings) -> list[Fault]:
    """All faults; none where all is well."""
    checks = (
        network_faults.addresses,
        network_faults.forwarding,
        network_faults.routes,
        network_faults.cables,
        network_faults.unreached,
        host_faults.versions,
        host_faults.transports,
        host_faults.memory,
        network_faults.detours,
        network_faults.slow_links,
        network_faults.packets,
        network_faults.order,
        host_faults.slow_hosts,
        host_faults.clocks,
        host_faults.disks,
    )
    return [fault for check in checks for fault in check(found)]
