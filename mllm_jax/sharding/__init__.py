"""Run on one device or a pod: meshes, sharding rules, collectives, several processes."""
