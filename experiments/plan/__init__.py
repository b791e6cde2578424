"""Plans of studies on a topology, without weights or hardware."""
