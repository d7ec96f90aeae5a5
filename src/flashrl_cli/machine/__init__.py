"""State of this machine: GPUs, processors, memory, disks and installed versions, read without changing anything."""
