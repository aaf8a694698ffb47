"""The script launch/cables."""

from launch_scripts import module

cables = module("cables")
