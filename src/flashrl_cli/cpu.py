"""Environment of everything that computes on a CPU: policy warm-up, training, evaluation."""

from __future__ import annotations

THREADS = {"GOMP_SPINCOUNT": "1000"}
"""Waiting OpenMP threads spin shortly, then sleep. Several processes share the cores here, and a thread that spins keeps the one it
waits for from running: on two cores with one busy process beside it, training the tiny policy took 14 times as long with
libgomp's own count, and not longer than its share with this one. To be set before torch is imported."""
KV_CACHE_GIB = 1
"""vLLM's KV cache on a CPU, in GiB: its default is far more than small models need."""
ENGINE = {**THREADS, "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}
"""For processes that start a vLLM engine."""
