"""Why a run failed: what lines in the logs of verl, Ray, vLLM and torch mean, and what to do about it.

The texts are those of verl 0.9.1, Ray 2.60, vLLM 0.24 to 0.28 and torch 2.11 to 2.13. A healthy log shows words such as
`Failed to`, `No such file or directory` and `ModuleNotFoundError` too, so a pattern names the complete phrase of the
failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashrl_cli.precision import BY_METHOD, PRECISIONS, joined


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run failed, recognized by a pattern in its log.

    `what` and `hint` are shown to the user; a command that has a better hint than a training run's looks it up by
    `id`. A `fatal` cause makes flashrl end a run that does not end itself.
    """

    id: str
    pattern: re.Pattern[str]
    what: str
    hint: str
    fatal: bool = True


def _cause(id_: str, what: str, hint: str, *patterns: str, fatal: bool = True) -> Cause:
    return Cause(id_, re.compile("|".join(patterns)), what, hint, fatal)


GPU = (
    _cause(
        "gpu-memory",
        "a GPU ran out of memory",
        "lower algorithm.max_tokens_per_gpu, rollout.log_prob_max_tokens_per_gpu or rollout.gpu_memory_utilization, or "
        "offload parameters and optimizer",
        r"torch\.(cuda\.)?OutOfMemoryError",
        r"CUDA out of memory",
        r"CUDA error: out of memory",
        r"CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _cause(
        "gpu-occupied",
        "a GPU has less free memory than the rollout engine asks for",
        "lower rollout.gpu_memory_utilization, or end what else runs there: `nvidia-smi` names it",
        r"Free memory on device .* is less than desired GPU memory utilization",
    ),
    _cause(
        "gpu-shared",
        "another process freed memory of a GPU while the rollout engine measured what is free there",
        "give the KV cache a size, so that nothing is measured: "
        "`--set verl.+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=BYTES`",
        r"Error in memory profiling\. Initial free memory",
    ),
    _cause(
        "gpu-failed",
        "a GPU failed",
        "take it or its node out of the run (`dmesg | grep Xid` names it), then `--resume auto`",
        r"uncorrectable ECC error encountered",
        r"NVRM: Xid",
        r"GPU has fallen off the bus",
        r"CUDA error: unspecified launch failure",
    ),
    _cause(
        "gpu-kernel",
        "a GPU kernel went wrong",
        "`CUDA_LAUNCH_BLOCKING=1` before the command makes the log name the kernel; "
        "`--rollout bf16` shows whether quantization is at fault",
        r"CUDA error: (an illegal memory access was encountered|device-side assert triggered|misaligned address)",
    ),
    _cause(
        "gpu-driver",
        "the NVIDIA driver is too old for this torch",
        "update the driver, or install the torch build for its CUDA version; `flashrl doctor` shows both",
        r"The NVIDIA driver on your system is too old",
        r"CUDA driver version is insufficient for CUDA runtime version",
    ),
    _cause(
        "gpu-unknown",
        "torch or vLLM was not built for this kind of GPU",
        "install builds for its compute capability; `flashrl doctor` shows it",
        r"no kernel image is available for execution on the device",
    ),
    _cause(
        "gpu-busy",
        "a GPU is taken by another process",
        "end that process (`nvidia-smi` names it), or choose others with CUDA_VISIBLE_DEVICES",
        r"CUDA-capable device\(s\) is/are busy or unavailable",
    ),
    _cause(
        "gpu-missing",
        "a process was given a GPU that is not there",
        "lower resources.gpus_per_node, or show more with CUDA_VISIBLE_DEVICES; `nvidia-smi -L` lists them",
        r"CUDA error: invalid device ordinal",
        r"No CUDA GPUs are available",
        r"Duplicate GPU detected",
    ),
    _cause(
        "nccl-timeout",
        "the GPUs waited in vain for one of them",
        "look in the log for the rank that died or hung first: the others only waited, "
        "and verl has no key for how long",
        r"Watchdog caught collective operation timeout",
    ),
    _cause(
        "nccl-error",
        "the GPUs could not talk to each other (NCCL)",
        "`NCCL_DEBUG=INFO` before the command makes the log show why; NCCL_SOCKET_IFNAME names the network to use",
        r"DistBackendError: NCCL error",
        r"nccl(UnhandledCuda|System|Remote|Internal)Error:",
    ),
)

MACHINE = (
    _cause(
        "ray-memory",
        "Ray ended a process because the machine's memory ran out",
        "lower the batch sizes or VLLM_CPU_KVCACHE_SPACE, or end what else takes memory here (`free -g`)",
        r"ray\.exceptions\.OutOfMemoryError",
        r"killed due to the node running low on memory",
        r"killed due to memory pressure \(OOM\)",
    ),
    _cause(
        "memory",
        "the machine's memory cannot hold what was asked for",
        "lower the batch sizes or VLLM_CPU_KVCACHE_SPACE, or end what else takes memory here (`free -g`)",
        r"DefaultCPUAllocator: (can't allocate|not enough) memory",
        r"Unable to allocate [\d.]+ [KMGTP]iB for an array",
        r"Cannot allocate memory",
        r"(^|\s)MemoryError\b",
        r"std::bad_alloc",
    ),
    _cause(
        "disk-full",
        "a disk is full",
        "`df -h` shows which: that of the checkpoints, of the run's folder, of /tmp (Ray), or /dev/shm; "
        "free space there",
        r"No space left on device",
        r"Disk quota exceeded",
        r"PytorchStreamWriter failed writing file",
        r"inline_container\.cc:\d+\] \. unexpected pos",
        r"ray\.exceptions\.OutOfDiskError",
    ),
    _cause(
        "permission",
        "a file or folder may not be read or written",
        "give this user the right to it (`ls -ld PATH`), or name others with FLASHRL_CHECKPOINTS and FLASHRL_RUNS",
        r"PermissionError: \[Errno 13\]",
        r"OSError: \[Errno 30\] Read-only file system",
        fatal=False,  # libraries try to use caches and go on without them
    ),
    _cause(
        "files-open",
        "too many open files",
        "`ulimit -n 65536` before the command",
        r"Too many open files",
    ),
    _cause(
        "processes",
        "this user may start no more processes or threads",
        "`ulimit -u unlimited` before the command, or a larger pids limit of the container",
        r"BlockingIOError: \[Errno 11\] Resource temporarily unavailable",
        r"RuntimeError: can't start new thread",
        r"pthread_create failed: Resource temporarily unavailable",
    ),
    _cause(
        "port-taken",
        "a network port is taken",
        "end the leftover Ray or vLLM process that holds it: `ss -ltnp` names it",
        r"[Aa]ddress already in use",
        r"EADDRINUSE",
        fatal=False,  # torch also logs this for one address family and goes on with the other
    ),
)

INPUTS = (
    _cause(
        "weights-damaged",
        "the model's weights are damaged",
        "fetch or write model.path anew: a file of it is cut short",
        r"SafetensorError",
    ),
    _cause(
        "checkpoint-damaged",
        "the checkpoint is damaged",
        "`--resume PATH` takes an earlier global_step_*, `--resume never` starts over",
        r"PytorchStreamReader failed",
        r"EOFError: Ran out of input",
    ),
    _cause(
        "checkpoint-size",
        "the checkpoint was written by another number of GPUs",
        "resume with the nodes and GPUs per node that wrote it, or start a new run from its exported weights",
        r"No such file or directory: '[^']*/global_step_\d+/\w+/(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt'",
    ),
    _cause(
        "weights-misfit",
        "the weights do not fit the model's configuration",
        "model.path and the checkpoint must be of the same model: look at its config.json",
        r"size mismatch for \S+: copying a param",
        r"You set `ignore_mismatched_sizes` to `False`",
        r"Error\(s\) in loading state_dict for",
    ),
    _cause(
        "tokenizer",
        "the tokenizer is missing, damaged, or has no chat template",
        "model.path needs tokenizer.json, tokenizer_config.json and a chat template beside the weights",
        r"Can't load tokenizer for",
        r"tokenizer\.chat_template is not set",
        r'/transformers/tokenization_utils_base\.py", line \d+, in _from_pretrained',
    ),
    _cause(
        "model",
        "the model could not be loaded",
        "check model.path; without a network it must be a local folder with config.json and weights",
        r"(OSError|HTTPError|LocalEntryNotFoundError|OfflineModeIsEnabled).*(huggingface|Hugging Face|repo|model)",
        r"does not appear to have a file named \S+",
        r"Error no file named \S+",
        r"Can't load the configuration of",
        r"Unrecognized model in",
        r"does not recognize this architecture",
    ),
    _cause(
        "data",
        "the training data cannot be read",
        "`flashrl prepare NAME --force` writes it anew",
        r"pyarrow\.lib\.ArrowInvalid",
        r"datasets\.exceptions\.DatasetGenerationError",
        r"Unable to find '[^']*\.parquet'",
        r"No such file or directory: '[^']*\.parquet'",
    ),
    _cause(
        "column",
        "the data lacks a column that verl reads",
        "`flashrl prepare NAME --force` writes all of prompt, data_source, reward_model and extra_info",
        r"KeyError: '(prompt|data_source|reward_model|extra_info)'$",
        fatal=False,  # a reward function may raise the same exception, after which verl goes on
    ),
    _cause(
        "no-data",
        "no training data is left",
        "raise data.max_prompt_length (longer prompts are dropped), "
        "or lower data.train_batch_size to the rows there are",
        r"filter dataset len: 0$",
        r"num_samples should be a positive integer value, but got num_samples=0",
    ),
    _cause(
        "no-scorer",
        "verl has no scorer for the data's data_source",
        "`flashrl prepare` writes sources that verl scores; others need verl.reward.custom_reward_function.path",
        r"Reward function is not implemented for data_source=",
        fatal=False,  # verl goes on with the other prompts
    ),
    _cause(
        "reward-function",
        "the reward function could not be loaded",
        "verl.reward.custom_reward_function.path must name a file that every node reads",
        r"Custom module file not found: module_path=",
        r"Error loading module from module_path=",
        r"Object not found in module: object_name=",
    ),
)

SETUP = (
    _cause(
        "setting",
        "verl refuses a setting",
        "the log's last exception names the key: `--set KEY=VALUE` or the preset's verl: section changes it",
        r"hydra\.errors\.\w+",
        r"omegaconf\.errors\.\w+",
        r'File "[^"]*/verl/utils/config\.py", line \d+, in validate_config',
    ),
    _cause(
        "package",
        "a Python package is missing",
        "install the stack that requirements/ pins; `flashrl doctor` compares what is here with it",
        r"^(\([^)]*\) )*ModuleNotFoundError: No module named",
        r"^(\([^)]*\) )*ImportError: ",
        r"importlib\.metadata\.PackageNotFoundError: ",
        fatal=False,  # libraries also log missing optional packages, and verl ends itself for a required one
    ),
    _cause(
        "cluster-small",
        "the cluster has fewer GPUs than the run asks for",
        "lower resources.nodes or resources.gpus_per_node; `ray status` shows what there is",
        r"Total available GPUs \S+ is less than total desired GPUs",
    ),
)

ENGINE = (
    _cause(
        "engine-unwritten",
        "a weight update left parameters of the rollout engine without their new weights",
        "the rollouts would not be the policy's: the log names the parameters; vLLM's model of this architecture "
        "and the trainer's must have the same weights (look at model.path's config.json), "
        "and `flashrl doctor --quant` tests the engine itself",
        r"coverage\.Incomplete: the weight update (left|lacked|brought)",
        r"coverage\.Incomplete: (the engine refused|\d+ tensors of) the weight update",
    ),
    _cause(
        "kv-memory",
        "the rollout engine has no memory left for its KV cache",
        "raise rollout.gpu_memory_utilization (VLLM_CPU_KVCACHE_SPACE on a CPU) or lower data.max_response_length",
        r"No available memory for the cache blocks",
        r"larger than the available KV cache memory",
    ),
    _cause(
        "kv-memory-cpu",
        "the machine has less memory than the rollout engine's KV cache asks for",
        "lower VLLM_CPU_KVCACHE_SPACE (GiB)",
        r"on kv cache allocation is less than requested memory for kv",
    ),
    _cause(
        "quantization",
        "the rollout engine does not know the quantization",
        f"rollout.precision takes {joined(PRECISIONS, 'or')}; {joined(BY_METHOD, 'and')} need flashrl installed "
        "beside vLLM on every node",
        r"Unknown quantization method",
    ),
    _cause(
        "attention",
        "the rollout engine does not know the attention backend",
        "leave attention_backend to vLLM, or take one of those that the log lists",
        r"Unknown attention backend: ",
    ),
    _cause(
        "model-length",
        "prompt and response are longer than the model can take",
        "lower data.max_prompt_length or data.max_response_length to the model's max_position_embeddings",
        r"User-specified max_model_len \(\d+\) is greater than the derived max_model_len",
    ),
    _cause(
        "engine-start",
        "the rollout engine did not start",
        "the lines above it in the log show why",
        r"Engine core initialization failed",
        r"EngineCore failed to start",
        r"WorkerProc failed to start",
    ),
    _cause(
        "engine-died",
        "a worker of the rollout engine died",
        "`dmesg` shows whether the system killed it for memory; `--resume auto` goes on from the last checkpoint",
        r"(Worker|Engine core) proc \S+ died unexpectedly",
        r"RayWorkerProc rank=\S+ died unexpectedly",
        r"engine core exited unexpectedly",
        r"EngineDeadError",
        r"EngineCore encountered a fatal error",
    ),
)

SAMPLING = (
    _cause(
        "sampling-batch",
        "no response of a whole batch could be sampled and scored",
        "the exceptions after `Error in _run_prompt` in the log show why",
        r"selected terminal groups with no materializable trajectories",
        r"groups of responses have failed in a row",
    ),
    _cause(
        "sampling",
        "responses could not be sampled or scored",
        "the exceptions after `Error in _run_prompt` in the log show why",
        r"Error in _run_prompt\b",
        fatal=False,  # verl goes on with the other prompts
    ),
)

TRAINING = (
    _cause(
        "all-rejected",
        "correction.reject left out every token of a step",
        "wider bounds, or --set correction.reject=null",
        r"ValueError: At least one element in the mask has to be 1\.",
        r"ValueError: The sum of the mask is one, which can cause a division by zero\.",
    ),
)

RAY = (
    _cause(
        "ray-late",
        "Ray did not start in time",
        "it gives itself 30 s: end what else keeps this machine busy (`uptime`, `top`), and try again",
        r"The current node timed out during startup",
    ),
    _cause(
        "ray-broken",
        "Ray itself broke down",
        "the logs under /tmp/ray/session_latest say why; `--resume auto` goes on from the last checkpoint",
        r"Raylet is terminated\. Termination is unexpected",
        r"local raylet (died|failed)",
        r"the [Rr]aylet (is unavailable \(crashed\)|has most likely crashed)",
        r"Failed to connect to GCS within",
        r"NodeDiedError",
        r"\b\w+\.cc:\d+: .*\bCheck failed: ",
        r"have not registered within the timeout\. The process is dead",
        r"the node it was running on is dead or unavailable",
    ),
    _cause(
        "node-lost",
        "a Ray worker or its node cannot be reached",
        "`ray status` shows the nodes that are left; `--resume auto` goes on from the last checkpoint",
        r"has been marked dead because the detector has missed too many heartbeats",
        r"ActorUnavailableError",
    ),
    _cause(
        "worker-died",
        "a Ray worker died",
        "the lines above it in the log show why; `dmesg` shows whether the system killed it for memory",
        r"ActorDiedError",
        r"WorkerCrashedError",
        r"A worker died or was killed",
    ),
)

CAUSES = (*GPU, *MACHINE, *INPUTS, *SETUP, *ENGINE, *RAY, *SAMPLING, *TRAINING)
"""All causes, the most specific first: `cause_in` returns the first that matches."""


def cause_in(line: str) -> Cause | None:
    """The cause of failure that `line` shows, if any."""
    return next((cause for cause in CAUSES if cause.pattern.search(line)), None)
