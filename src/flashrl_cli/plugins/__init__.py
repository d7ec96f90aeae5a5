"""Code that runs inside verl and vLLM workers; it does nothing outside a run of flashrl's."""
