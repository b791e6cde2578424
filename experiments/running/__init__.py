"""The command lines of the programs here, the lock of a workdir, signals and several processes."""
