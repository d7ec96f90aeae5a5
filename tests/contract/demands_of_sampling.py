"""Mistakes in how responses are drawn, and in what their log-probs are."""

from __future__ import annotations

from tests.contract.demands_case import ENGINE, R, case

TRUNCATED = "renormalized over the kept tokens"
SAMPLING = [
    case(
        "weights_see_what_was_sampled",
        "rollout.top_p=0.9",
        "correction.cap=2",
        says="rollout.top_p = 0.9 with truncated importance sampling: vLLM's log-probs are " + TRUNCATED,
        hint="--set rollout.top_p=1.0, or --tis off",
        legal=("rollout.top_p=0.9", "correction.cap=null"),
    ),
    case(
        "weights_see_what_was_sampled",
        "rollout.top_k=20",
        "correction.cap=8",
        says="rollout.top_k = 20 with truncated importance sampling",
        hint="--set rollout.top_k=-1, or --tis off",
        legal=("rollout.top_k=0", "correction.cap=8"),
    ),
    case(
        "weights_see_what_was_sampled",
        "rollout.top_p=0.999",
        "correction.reject.by=seq-mean",
        "correction.reject.upper=2",
        says="rollout.top_p = 0.999 with correction.reject",
        hint="--set rollout.top_p=1.0, or --set correction.reject=null",
        legal=("correction.reject.by=seq-mean", "correction.reject.upper=2"),
    ),
    case(
        "weights_see_what_was_sampled",
        "rollout.top_p=0.9",
        "correction.kind=icepop",
        "correction.reject.by=seq-mean",
        "correction.reject.upper=2",
        says="with IcePop's importance weights",
        hint="--tis off and --set correction.reject=null",
    ),
    case(
        "weights_see_what_was_sampled",
        "rollout.top_p=0.9",
        "correction.cap=2",
        f"verl.{R}.val_kwargs.temperature=1.0",
        f"verl.{R}.val_kwargs.top_p=0.7",
        says=TRUNCATED,
        hint="validation may truncate",
        legal=("correction.cap=2", f"verl.{R}.val_kwargs.temperature=1.0", f"verl.{R}.val_kwargs.top_p=0.7"),
    ),
    case(
        "log_probs_are_of_the_samples",
        f"verl.{R}.logprobs_mode=raw_logits",
        says="are no log-probs",
        hint=f"verl.{R}.logprobs_mode=processed_logprobs",
        legal=(f"verl.{R}.logprobs_mode=raw_logits", f"verl.{R}.calculate_log_probs=false"),
    ),
    case(
        "log_probs_are_of_the_samples",
        f"verl.{R}.logprobs_mode=raw_logprobs",
        "rollout.temperature=0.7",
        says="taken before rollout.temperature = 0.7, by which the trainer divides",
        hint=f"verl.{R}.logprobs_mode=processed_logprobs",
        legal=(f"verl.{R}.logprobs_mode=raw_logprobs", "rollout.top_p=0.9"),
    ),
    case(
        "log_probs_are_of_the_samples",
        f"verl.{R}.logprobs_mode=null",
        "rollout.temperature=1.3",
        says="taken before rollout.temperature = 1.3",
        hint=f"verl.{R}.logprobs_mode=processed_logprobs",
    ),
    case(
        "temperature_is_the_engines",
        "rollout.temperature=0.001",
        says="would sample at 0.01 and the trainer divide by rollout.temperature = 0.001",
        hint="--set rollout.temperature=0.01",
        legal=("rollout.temperature=0.01",),
    ),
    *(
        case(
            "requests_are_not_engine_arguments",
            f"verl.+{ENGINE}.{text}",
            says="is an option of a request",
            hint=f"drop verl.+{ENGINE}.{text.partition('=')[0].removesuffix('.7')}",
            legal=(f"verl.+{ENGINE}.max_logprobs=20",),
        )
        for text in ("min_p=0.1", "repetition_penalty=1.1", "bad_words=[no]", "stop=[no]", "logit_bias.7=1.0", "n=2")
    ),
    case(
        "requests_are_not_engine_arguments",
        f"verl.+{ENGINE}.top_p=0.9",
        says="top_p is an option of a request",
        hint="--set rollout.top_p=0.9 instead",
    ),
    case(
        "logits_are_not_processed",
        f"verl.+{ENGINE}.logits_processors=[mine:Processor]",
        "correction.cap=2",
        says="logits processors with truncated importance sampling",
        hint=f"drop verl.+{ENGINE}.logits_processors, or --tis off",
        legal=(f"verl.+{ENGINE}.logits_processors=[mine:Processor]",),
    ),
    case(
        "drafts_leave_the_distribution",
        f"verl.+{ENGINE}.speculative_config.rejection_sample_method=synthetic",
        f"verl.+{ENGINE}.speculative_config.method=ngram",
        says="does not sample from the policy",
        hint=f"drop verl.+{ENGINE}.speculative_config.rejection_sample_method",
        legal=(f"verl.+{ENGINE}.speculative_config.method=ngram",),
    ),
    case(
        "drafts_leave_the_distribution",
        f"verl.+{ENGINE}.spec_method=ngram",
        "correction.cap=2",
        says="speculative decoding with truncated importance sampling",
        hint=f"drop verl.+{ENGINE}.spec_method, or --tis off",
        legal=(f"verl.+{ENGINE}.spec_method=ngram",),
    ),
    case(
        "drafts_leave_the_distribution",
        f"""verl.+{ENGINE}.speculative_config='{{"method": "ngram", "rejection_sample_method": "synthetic"}}'""",
        says="does not sample from the policy",
        hint=f"drop verl.+{ENGINE}.speculative_config",
        legal=(f"""verl.+{ENGINE}.speculative_config='{{"method": "ngram"}}'""",),
    ),
    case(
        "responses_of_a_group_differ",
        f"verl.{R}.full_determinism=true",
        "rollout.n=4",
        says="the 4 responses to a prompt would be one",
        hint=f"verl.{R}.full_determinism=false",
        legal=(f"verl.{R}.full_determinism=true", "rollout.n=1"),
    ),
    case(
        "responses_of_a_group_differ",
        f"verl.{R}.full_determinism=true",
        "rollout.n=1",
        "resources.platform=cpu",
        says="at which vLLM's CPU engine ends",
        hint=f"verl.{R}.full_determinism=false",
        legal=(f"verl.{R}.full_determinism=true", "rollout.n=1"),
    ),
]
