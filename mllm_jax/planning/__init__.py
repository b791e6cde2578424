"""Plan the memory, work and traffic of compiled programs, without weights or hardware."""
