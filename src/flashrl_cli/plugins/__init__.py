"""Code that runs inside verl and vLLM workers; outside of a flashrl run it changes nothing."""
