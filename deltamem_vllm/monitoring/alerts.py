# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""When somebody should look. Each alert names a section of the guide that says what to do."""

from __future__ import annotations

from deltamem_vllm.monitoring import recording, thresholds
from deltamem_vllm.monitoring.model import ENGINE_LABELS, SERVER_LABELS, Alert, Condition
from deltamem_vllm.monitoring.names import POLICY_INFO

_WHERE = "{{ $labels.instance }} engine {{ $labels.engine }} ({{ $labels.model_name }})"
_SERVER = "{{ $labels.instance }} ({{ $labels.model_name }})"
_SHARE = "{{ $value | humanizePercentage }}"
_UP = 'up{job="deltamem"}'

ALERTS: tuple[Alert, ...] = (
    Alert(
        "DeltaMemServerDown",
        (Condition(_UP, "== 0"),),
        lasts="1m",
        severity="critical",
        labels="job, instance",
        summary="{{ $labels.instance }} does not answer",
        description="Prometheus could not scrape /metrics of {{ $labels.instance }} for a minute.",
        meaning="Prometheus gets no answer from `/metrics`: the server is down, hangs, or cannot be reached.",
        action="Ask `curl http://SERVER/health`. No answer: read the server's log; its last lines say why it stopped. "
        "A start that is refused says what to change, and `deltamem doctor` finds what is wrong with an installation. "
        "An answer: the target in `prometheus.yml` is wrong or a network stands between.",
    ),
    Alert(
        "DeltaMemPolicyOff",
        (
            # Every server that answers is 0, and counts its engines that say what they run with.
            Condition(
                f"count by (job, instance) ({POLICY_INFO}) or on (job, instance) 0 * ({_UP} == 1)",
                "== 0",
            ),
        ),
        lasts="5m",
        severity="warning",
        labels="job, instance",
        summary="{{ $labels.instance }} runs without deltamem",
        description="{{ $labels.instance }} answers, but none of its series is deltamem's.",
        meaning="The server is up and says nothing about deltamem: it was started without the flag.",
        action="Start it with `--kv-cache-policy deltamem`. If it is meant to be a stock vLLM, give it another job "
        "name in `prometheus.yml`.",
    ),
    Alert(
        "DeltaMemPoolFull",
        (
            Condition("vllm:kv_cache_usage_perc", f"> {thresholds.POOL_USE}"),
            Condition(recording.EVICTIONS, "> 0"),
        ),
        lasts="10m",
        severity="warning",
        summary=f"KV pool of {_WHERE} stays full although tokens are evicted",
        description=f"{_SHARE} of the blocks are in use, and evictions go on.",
        meaning="Eviction runs and the pool stays full: what the requests may keep together is more than the pool. New "
        "requests wait, and vLLM may preempt.",
        action="See *KV bytes against the budget*. Held at the budget: lower `keep_ratio` or set `keep_tokens`, bound "
        "requests with `--max-num-seqs`, or add a replica. Held far above it: requests are shorter than `min_tokens` "
        "or ask for `deltamem_policy: off`; or compactions are skipped (*Skipped compactions by reason*).",
    ),
    Alert(
        "DeltaMemPreemptions",
        (
            Condition(recording.PREEMPTIONS, "> 0"),
            Condition(f"group by ({ENGINE_LABELS}) ({POLICY_INFO})", "== 1"),
        ),
        lasts="15m",
        severity="warning",
        summary=f"vLLM preempts requests of {_WHERE} although tokens could be evicted",
        description='{{ printf "%.2g" $value }} preemptions a second for 15 minutes.',
        meaning="vLLM threw requests out of the pool again and again. They are computed again in full, which costs "
        "time, and those that had been compacted start over: their text can differ from a run without preemption.",
        action="Look at *Evictions by reason* and *Skipped compactions by reason*. Nothing evicted: requests are "
        "shorter than `min_tokens`, or `keep_ratio` is 1. Skipped: see "
        "[DeltaMemCompactionsSkipped](#deltamemcompactionsskipped). Evicted to the budget: the pool is too small for "
        "so many requests; lower `--max-num-seqs` or what each keeps.",
    ),
    Alert(
        "DeltaMemCompactionsSkipped",
        (
            Condition(
                f"sum by ({ENGINE_LABELS}) "
                '(increase(deltamem_compactions_skipped_total{reason="no_free_blocks"}[5m]))',
                "> 0",
            ),
        ),
        lasts="15m",
        severity="warning",
        summary=f"Compactions of {_WHERE} find no free blocks",
        description='{{ printf "%.0f" $value }} due compactions were skipped in 5 minutes, and for 15 minutes so.',
        meaning="Requests were due for a compaction and there was neither room for a copy nor could they be packed in "
        "place, since other requests share their blocks. A request that stays due counts in every step.",
        action="In mode `pressure` lower `high_watermark`: what is above it is room for copies. Requests with a long "
        "common prompt: fewer of them at once, or no prefix caching for this model (`--no-enable-prefix-caching`), "
        "whichever costs less.",
    ),
    Alert(
        "DeltaMemOverheadHigh",
        (Condition(recording.OVERHEAD, f"> {thresholds.OVERHEAD}"),),
        lasts="15m",
        severity="warning",
        summary=f"The policy takes {_SHARE} of the time of {_WHERE}",
        description="Deciding and compacting together, over 15 minutes.",
        meaning="Deciding what to evict and compacting take time between steps in which no token is made.",
        action="*Policy overhead* says which. Compacting, mostly scoring: another `scorer`, or a calibration "
        "(`deltamem calibrate`), whose scores last. Compacting often: raise `interval`, or in mode `pressure` lower "
        "`low_watermark`, so that fewer compactions take more each. On a CPU see whether the native library is there "
        "(`deltamem doctor`). Deciding: very many requests at once; please report it with the output of "
        "`deltamem doctor`.",
    ),
    Alert(
        "DeltaMemKeptShareAtFloor",
        (
            Condition(recording.KEPT_SHARE, f"< {thresholds.LITTLE_KEPT}"),
            Condition(f"{recording.KEPT_SHARE} - {recording.FLOOR_SHARE}", f"< {thresholds.ABOVE_FLOOR}"),
            # Requests that are left alone raise the floor; where most requests are, it says nothing of the others.
            Condition(recording.COMPACTED_SHARE, f"> {thresholds.MOSTLY}"),
            Condition(f'group by ({ENGINE_LABELS}) ({POLICY_INFO}{{mode="pressure"}})', "== 1"),
        ),
        lasts="1h",
        severity="warning",
        summary=f"Requests of {_WHERE} have been at their floor for an hour",
        description=f"Half of the compactions leave less than {_SHARE} of a request: no more than it is promised.",
        meaning="Mode `pressure` evicts only as memory is short, but for an hour all requests were cut down to "
        "`keep_ratio`. Answers are as much at risk as this setting allows, and there is nothing left to evict when "
        "more requests come.",
        action="*Kept share, quantiles* says how much is left. Find out what that costs with `deltamem eval` on your "
        "model; raise `keep_ratio` to what you accept, then give the pool room: fewer requests at once, a larger "
        "`--gpu-memory-utilization`, another replica.",
    ),
    Alert(
        "DeltaMemRefusals",
        (Condition(recording.REFUSED_SHARE, f"> {thresholds.REFUSED_SHARE}"),),
        lasts="15m",
        severity="warning",
        labels=SERVER_LABELS,
        summary=f"{_SHARE} of the requests to {_SERVER} are refused",
        description="The policy answers them with 400; its message says what was given and what is allowed.",
        meaning="A client sends what the policy cannot serve. `bad_option`: a `deltamem_*` option is misspelt or out "
        "of range. `does_not_fit`: a prompt longer than the pool keeps more than the pool holds. `prompt_logprobs`: "
        "log-probs of a prompt that may be evicted. `streaming_session`: input that goes on while the request runs.",
        action="*Refused requests by reason* says which; the answer to the client says how to ask instead. Requests "
        "that need `prompt_logprobs` can be sent with `deltamem_policy: off`. For `does_not_fit` set `keep_tokens`.",
    ),
    Alert(
        "DeltaMemMixedVersions",
        (
            Condition(
                f"count by (job, model_name) (group by (job, model_name, version) ({POLICY_INFO}))",
                "> 1",
            ),
        ),
        lasts="30m",
        severity="warning",
        labels="job, model_name",
        summary="{{ $labels.model_name }} is served by {{ $value }} versions of deltamem",
        description="Replicas of one model differ in version for half an hour: longer than a rolling update takes.",
        meaning="Replicas of one model run different versions of deltamem. The same request may then keep other tokens "
        "on one than on another. Two versions inside one server are in its log instead: *unknown to deltamem*.",
        action="*Active policies* lists who runs what. Finish the update, or serve the two groups under different "
        "names.",
    ),
)
