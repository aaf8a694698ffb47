"""What is wrong with a cluster, most serious first, each with what fixes it.

First what keeps a job from running, then what makes it slow, then what may do so.
"""

from mlxtp.doctor import host_faults, network_faults
from mlxtp.doctor.findings import Fault, Findings


def faults(findings: Findings) -> list[Fault]:
    """Return all faults; an empty list where all is well."""
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
        network_faults.lacking,
        network_faults.slow_links,
        network_faults.packets,
        network_faults.order,
        host_faults.slow_hosts,
        host_faults.clocks,
        host_faults.disks,
    )
    return [fault for check in checks for fault in check(findings)]
