"""flashrl: reinforcement learning with quantized rollouts on stock verl, Ray and vLLM.

Imported inside every Ray and vLLM worker through the plugins, so it holds the version and nothing else.
"""

__version__ = "0.2.0"
