"""Mesh and sharding rules, processes, chips, cost of compiled programs."""
