"""The script launch/ring."""

from launch_scripts import module

ring = module("ring")
