"""What this machine has, judged: probes read it, and judgments of plain data turn it into findings with a fix."""
