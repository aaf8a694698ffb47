"""What commands of macOS print."""

import json

HARDWARE_PORTS = """

Hardware Port: Ethernet
Device: en0
Ethernet Address: 1c:1d:d3:00:00:00

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:aa:bb:cc:00:00

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:aa:bb:cc:00:01

Hardware Port: Thunderbolt 2
Device: en3
Ethernet Address: 36:aa:bb:cc:00:02

Hardware Port: Thunderbolt 3
Device: en4
Ethernet Address: 36:aa:bb:cc:00:03

Hardware Port: Thunderbolt 4
Device: en5
Ethernet Address: 36:aa:bb:cc:00:04

VLAN Configurations
===================
"""


def bus(number: int, domain: str | None, *items: dict[str, str]) -> dict[str, object]:
    """An entry of `system_profiler SPThunderboltDataType -json`."""
    connected = "receptacle_connected" if items else "receptacle_no_devices_connected"
    entry = {
        "_name": f"thunderboltusb5_bus_{number - 1}",
        "device_name_key": "Mac Studio",
        "receptacle_1_tag": {
            "current_speed_key": "Up to 80 Gb/s",
            "link_status_key": "0x2" if items else "0x7",
            "receptacle_id_key": str(number),
            "receptacle_status_key": connected,
        },
        "route_string_key": "0",
        "switch_uid_key": f"0x05AC4F6D9D6E8E0{number}",
        "vendor_name_key": "Apple Inc.",
    }
    if domain:
        entry["domain_uuid_key"] = domain
    if items:
        entry["_items"] = list(items)
    return entry


MAC = {
    "_name": "Mac Studio",
    "device_name_key": "Mac Studio",
    "domain_uuid_key": "B-1",
    "mode_key": "thunderbolt_five",
    "vendor_name_key": "Apple Inc.",
}
DISPLAY = {"_name": "Studio Display", "device_name_key": "Studio Display"}
PROFILE = json.dumps(
    {
        "SPThunderboltDataType": [
            bus(3, "A-3"),
            bus(1, "A-1", MAC),
            bus(2, "A-2", DISPLAY),
            bus(4, "A-4", {**MAC, "domain_uuid_key": "C-1"}),  # not a port with RDMA
            bus(5, None),
        ]
    }
)
