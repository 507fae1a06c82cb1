"""Which traces live: groups, requests, the pruning policy, metrics. Knows nothing of SGLang."""
