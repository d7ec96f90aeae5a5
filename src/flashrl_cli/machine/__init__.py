"""What this machine has: GPUs, processors, memory, disk and installed versions, read without changing anything."""
