"""The script launch/cables."""

from launch_scripts import module

ring = module("ring")
