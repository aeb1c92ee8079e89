"""Devices: profiles, what fits, what it costs, engines, what this machine has."""
