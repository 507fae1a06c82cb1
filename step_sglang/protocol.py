"""Every name that crosses a process or the network, in one place."""

# `custom_params: {"step": ...}` in a request, or `session_params: {"step": ...}`, as sglang-router
# drops the former; `meta_info["step"]` in its response.
REQUEST_KEY = "step"
# `session_params: {"step_sampling": {...}}`: sampling parameters that routers drop, such as nulls.
SAMPLING_KEY = "step_sampling"
META_KEY = "step"

# `custom_params: {"play": [question, asked]}` of a simulation: whose traces the request plays.
PLAY_KEY = "play"
# A `stream_interval` that no trace reaches: only its end is sent.
NEVER_STREAMED = 1 << 30

# Members of the request value when it is an object.
GROUP = "group"
WEIGHT = "weight"
MIN_SURVIVORS = "min_survivors"
STEP_SCORES = "step_scores"
HIDDEN_STATES = "hidden_states"
PROMPT_TOKENS = "prompt_tokens"
TRACE = "trace"
BASELINE = "baseline"
RECORD = "record"
PRUNED = "pruned"
SHOW_TEXT = "show_text"
PRUNE_AT = "prune_at"
REFILL = "refill"
SAMPLE = "sample"
REQUEST_MEMBERS = (
    GROUP, TRACE, WEIGHT, MIN_SURVIVORS, STEP_SCORES, HIDDEN_STATES, PROMPT_TOKENS, BASELINE,
    RECORD, PRUNED, SHOW_TEXT, PRUNE_AT, REFILL, SAMPLE,
)  # fmt: skip

# How a pruned trace is reported: the values of PRUNED.
PRUNED_ABORT = "abort"  # with `finish_reason` abort
PRUNED_LENGTH = "length"  # with `finish_reason` length, which typed clients know
PRUNED_OMIT = "omit"  # like that, and not at all in an OpenAI answer of several choices
PRUNED_MODES = (PRUNED_ABORT, PRUNED_LENGTH, PRUNED_OMIT)

# What freed memory is used for: the values of REFILL.
REFILL_OFF = "off"
REFILL_BEST = "best"  # traces that branch from the best prefixes
REFILL_RANDOM = "random"  # the control: from any
REFILL_GAMBIT = "gambit"  # by the rule of Gambit (arXiv 2608.08020), for comparison
REFILL_FLAGS = (REFILL_OFF, REFILL_BEST, REFILL_RANDOM)
REFILL_MODES = (*REFILL_FLAGS, REFILL_GAMBIT)

# Members that ask for one voted answer instead; they never reach the scheduler.
TRACES = "traces"
VOTE = "vote"
EARLY = "early"
THRESHOLD = "threshold"
EXTRACT = "extract"
SUFFIX = "suffix"
SHRINK = "shrink"
EFFORT = "effort"
VOTE_MEMBERS = (TRACES, VOTE, EARLY, THRESHOLD, SHRINK, EFFORT, EXTRACT, SUFFIX)

# Choices by name, in requests and flags.
VOTE_CALIBRATED = "calibrated"
VOTES = (VOTE_CALIBRATED, "weighted", "majority", "best")
DEFAULT_VOTE = VOTE_CALIBRATED
EARLY_ENDS = ("exact", "posterior")  # that can end a vote before its last trace
EARLY_RULES = (*EARLY_ENDS, "off")
EFFORTS = ("fast", "balanced", "thorough")  # from the cheapest vote to the safest
EXTRACTORS = ("boxed", "choice", "number")  # who reads a trace's answer
NGRAMS = "ngrams"  # the embedding of a step that needs no model

# Members of the response value: of every trace, of a pruned one, and what a request asked for.
META_GROUP = "group"
META_SCORE = "score"
META_NUM_STEPS = "num_steps"
META_PRUNED = "pruned"
META_REASON = "reason"
META_STOPPED = "stopped"
META_STEP_SCORES = "step_scores"
META_POSITIONS = "positions"
META_HIDDEN_STATES = "hidden_states"
META_CONFIDENCE = "confidence"
META_RECORD = "record"
META_CALIBRATION = "calibration"  # [slope, bias] of the scorer, where its file has one
META_SAMPLED = "sampled"  # true: the group is kept for training, so none of it is pruned
META_BRANCH = "branch"
BRANCH_PARENT = "parent"  # request id
BRANCH_POSITION = "position"  # of the parent's last token that the branch begins with
BRANCH_DEPTH = "depth"  # 1: the parent is no branch itself
BRANCH_LINEAGE = "lineage"  # [name, steps] of each ancestor, the first one first
BRANCH_NAME = "name"  # in the lineage of others
# From the scheduler to the tokenizer manager alone: what to add to the tokens that are reported.
META_EXTRA_TOKENS = "extra_tokens"
RECORD_TIMES = "token_times"
RECORD_CONFIDENCES = "confidences"

# `finish_reason["message"]` of a pruned trace begins with this.
PRUNED_MESSAGE = "pruned by STEP"

# Tells child processes that the engine's hooks are wanted; the configuration itself travels with
# the server's arguments.
HOOKS_ENV = "STEP_SGLANG_HOOKS"
# Names the folder of a model that plays traces on a virtual GPU.
VIRTUAL_GPU_ENV = "STEP_SGLANG_VIRTUAL_GPU"
# Set to 1 by an operator: an SGLang that STEP was not tested with may be used.
UNTESTED_ENV = "STEP_UNTESTED_SGLANG"
# Tells them where the main process built the CUDA library, when the installation has none.
CUDA_LIBRARY_ENV = "STEP_SGLANG_CUDA_LIBRARY"
# Tell several tokenizer workers where they find each other, and what their application is.
WORKERS_ENV = "STEP_SGLANG_WORKERS"
APP_ENV = "STEP_SGLANG_APP"
# What one of them asks of another: to end requests of a group, traces, or a vote.
ASK_ABORT_GROUP = "abort_group"
ASK_END_TRACES = "end_traces"
ASK_ABORT_VOTES = "abort_votes"  # of an id, or whose id begins so; None: of all

# Why a trace was pruned, in the response, the log line and the metrics.
PRUNED_FOR_DECODE = "decode"  # the next decode step did not fit
PRUNED_FOR_WATERMARK = "watermark"  # groups would hold more than their share of the pool
PRUNED_FOR_ADMISSION = "admission"  # a waiting request did not fit
PRUNED_FOR_VOTE = "shrink"  # fewer traces settle the vote
PRUNED_FOR_CONFIDENCE = "confidence"  # DeepConf
PRUNED_FOR_SIMILARITY = "similarity"  # Slim-SC
PRUNED_FOR_REFILL = "refill"  # gave way to a branch of a better trace
PRUNING_REASONS = (
    PRUNED_FOR_DECODE, PRUNED_FOR_WATERMARK, PRUNED_FOR_ADMISSION, PRUNED_FOR_VOTE,
    PRUNED_FOR_CONFIDENCE, PRUNED_FOR_SIMILARITY, PRUNED_FOR_REFILL,
)  # fmt: skip

# Why a branch was started, in the log line and the metrics.
BRANCHED_FOR_ROOM = "room"  # memory was free
BRANCHED_FOR_SWAP = "swap"  # in the place of a trace that gave way
BRANCHING_REASONS = (BRANCHED_FOR_ROOM, BRANCHED_FOR_SWAP)

# The endpoint that ends a group, and its answer's member.
ABORT_GROUP_PATH = "/step/abort_group"
ABORTED = "aborted"
# The endpoint that ends traces that a vote does not need, and its answer's member.
END_TRACES_PATH = "/step/end_traces"
ENDED = "ended"
# The live page and its feed.
PAGE_PATH = "/step"
EVENTS_PATH = "/step/events"
# A question about the scheduler's state whose id is one of these asks for the feed alone.
FEED_NEXT = "step-feed-next"  # what happened since the last one
FEED_STOP = "step-feed-stop"  # nobody looks any more
FEED = "step_feed"  # the answer's one member
# What an answer to `traces` says of its vote, under `meta_info["step"]["vote"]`.
META_VOTE = "vote"
NOT_VOTED = "not_voted"  # the vote's status where none was taken although one was asked for

# Where STEP itself failed while the server went on, in the log line, metrics and `/server_info`.
IN_SCORING = "scoring"
IN_PRUNING = "pruning"
IN_ADMISSION = "admission"
IN_REFILL = "refill"
IN_REQUESTS = "requests"
IN_RESPONSES = "responses"
IN_METRICS = "metrics"
IN_PAGE = "page"
IN_SAMPLING = "sampling"
IN_TRACING = "tracing"
FAILURE_PLACES = (
    IN_SCORING, IN_PRUNING, IN_ADMISSION, IN_REFILL, IN_REQUESTS, IN_RESPONSES, IN_METRICS, IN_PAGE,
    IN_TRACING, IN_SAMPLING,
)  # fmt: skip
