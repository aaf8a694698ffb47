"""What commands of macOS print."""

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
