"""What STEP can be told, with every default: the one source of the flags and engine arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from step_sglang.errors import ConfigError, nearest
from step_sglang.protocol import (
    DEFAULT_VOTE,
    EFFORTS,
    EXTRACTORS,
    NGRAMS,
    PRUNED_ABORT,
    PRUNED_MODES,
    REFILL_FLAGS,
    REFILL_OFF,
    VOTES,
)

POLICIES = ("fair", "paper")
SCOPES = ("thinking", "all")
ADMISSIONS = ("fair", "queue")
PAGES = ("on", "off")
LOGS = ("summary", "each")
AUTO, OFF = "auto", "off"
NO_SCORER = "none"  # in place of a scorer file: the model's own certainty scores the steps
DEFAULT_DELIMITERS = ("\n\n",)


@dataclass(frozen=True)
class StepConfig:
    """One server's STEP settings; immutable, picklable, checked on construction.

    Raises:
        ConfigError: a value is outside its range or two values contradict each other.
    """

    scorer: str = field(
        default="",
        metadata={
            "metavar": "S",
            "help": "Scorer file (.safetensors or the reference's .pt); org/name[/file][@revision] "
            "on the Hugging Face Hub; auto, the one known for this model; or none: a step's score "
            "is how certain the model was of its tokens, which needs no training.",
        },
    )
    policy: str = field(
        default="fair",
        metadata={
            "choices": POLICIES,
            "help": "fair: the lowest trace score of the group that holds the most KV. paper: the "
            "lowest score of all running traces, unscored = 0, scope all, as the reference does.",
        },
    )
    scope: str | None = field(
        default=None,
        metadata={
            "choices": SCOPES,
            "help": "Which steps are scored: up to the first think-end token (default), or all "
            "(the only choice, and the default, with --step-policy paper).",
        },
    )
    min_survivors: int = field(
        default=1,
        metadata={"metavar": "K", "help": "Pruning never leaves a group fewer survivors."},
    )
    min_steps: int = field(
        default=1,
        metadata={
            "metavar": "K",
            "help": "A trace with fewer scored steps ranks as its group's mean.",
        },
    )
    delimiters: tuple[str, ...] = field(
        default=(),
        metadata={
            "flag": "--step-delimiter",
            "metavar": "STR",
            "help": "Text that ends a step (default: the scorer file's, else two newlines); "
            r"\n, \t and \\ are understood.",
        },
    )

    capture: bool = field(
        default=False,
        metadata={
            "help": "Collect training data: requests may ask for the hidden states at their step "
            "boundaries, and nothing is pruned. Needs no scorer.",
        },
    )

    admit: str | None = field(
        default=None,
        metadata={
            "choices": ADMISSIONS,
            "help": "When a waiting request does not fit. fair (default): traces of groups that "
            "hold more than it would are pruned, so that it starts at once. queue: it waits (the "
            "only choice, and the default, with --step-policy paper).",
        },
    )
    prune_at: float = field(
        default=1.0,
        metadata={
            "metavar": "F",
            "help": "The share of the KV pool that groups may fill, above 0 and at most 1, before "
            "their worst traces are pruned. 1: pruning waits until memory is short (the only "
            "choice with --step-policy paper).",
        },
    )
    max_groups: str | int = field(
        default=OFF,
        metadata={
            "metavar": "auto|off|N",
            "help": "How many groups run at once; the others wait, by arrival. auto: as many as "
            "keep a useful number of survivors each. off: all (the only choice with --step-policy "
            "paper).",
        },
    )
    max_batch: str | int = field(
        default=AUTO,
        metadata={
            "metavar": "auto|off|N",
            "help": "Traces start only while fewer requests run. auto: the largest batch that has "
            "a captured decode graph, where graphs are used.",
        },
    )
    refill: str = field(
        default=REFILL_OFF,
        metadata={
            "choices": REFILL_FLAGS,
            "help": "What freed memory is used for while a group's pruned traces are gone. best: "
            "new traces in their place, which branch from step boundaries of the best ones. "
            "random: from any, for comparison. off: nothing (the only choice with --step-policy "
            "paper and --step-capture).",
        },
    )
    traces: int = field(
        default=1,
        metadata={
            "metavar": "N",
            "help": "Answer every ordinary request (n = 1) with one choice, voted by N traces. "
            "1 is off.",
        },
    )
    vote: str = field(
        default=DEFAULT_VOTE,
        metadata={
            "choices": VOTES,
            "help": "How they vote. calibrated: by the odds of being right that the scorer file's "
            "calibration gives, or as weighted where it has none; weighted: by trace score; "
            "majority: by number; best: the best trace alone.",
        },
    )
    extract: str = field(
        default="boxed",
        metadata={
            "choices": EXTRACTORS,
            "help": "Where a trace's answer is: in \\boxed{}, a choice's letter, the last number.",
        },
    )
    effort: str | float = field(
        default="thorough",
        metadata={
            "metavar": "fast|balanced|thorough|E",
            "help": "How soon votes end and how much memory they may fill, where a request does "
            "not say: a word, or a number from 0 (fast) to 1 (thorough).",
        },
    )
    pruned: str = field(
        default=PRUNED_ABORT,
        metadata={
            "choices": PRUNED_MODES,
            "help": "How pruned traces are reported where a request does not say: with "
            "finish_reason abort; with length, which clients with types accept; or omit, which is "
            "length and leaves them out of chat and text completions of one prompt.",
        },
    )
    temperature: float = field(
        default=0.6,
        metadata={
            "metavar": "T",
            "help": "With --step-traces: of requests that ask for temperature 0, at which all "
            "traces would be the same.",
        },
    )
    embedding: str = field(
        default=NGRAMS,
        metadata={
            "metavar": "NAME",
            "help": "What requests that ask for Slim-SC compare thoughts by: ngrams, or a "
            "sentence-transformers model.",
        },
    )

    sample: str = field(
        default="",
        metadata={
            "metavar": "DIR",
            "help": "Keep a share of the groups that are served, as traces that step-sglang "
            "collect --from-traces reads, so that a scorer can be trained on them. They run to "
            "their end: none of them is pruned.",
        },
    )
    sample_share: float = field(
        default=0.05,
        metadata={
            "metavar": "F",
            "help": "With --step-sample: which share of the groups, above 0 and at most 1.",
        },
    )
    sample_limit: int = field(
        default=1000,
        metadata={
            "metavar": "MB",
            "help": "With --step-sample: megabytes that DIR may hold; the oldest groups make room.",
        },
    )

    page: str = field(
        default="on",
        metadata={
            "choices": PAGES,
            "help": "off: no live page at /step, and no feed.",
        },
    )

    log: str = field(
        default="summary",
        metadata={
            "choices": LOGS,
            "help": "What the log says of prunings and branches: sums, once in ten seconds, or a "
            "line for each (which --log-level debug has too).",
        },
    )

    def __post_init__(self) -> None:
        if not self.scorer and not self.capture:
            raise ConfigError(
                "--enable-step needs --step-scorer PATH, the trained scorer file (or a repository "
                "on the Hub, or auto); without one, "
                f"--step-scorer {NO_SCORER} scores steps by how certain the model is of its tokens"
            )
        if not isinstance(self.capture, bool):
            raise ConfigError(f"--step-capture is on or off, not {self.capture!r}")
        _check_choice("--step-policy", self.policy, POLICIES)
        if self.scope is not None:
            _check_choice("--step-scope", self.scope, SCOPES)
        if self.policy == "paper" and self.scope == "thinking":
            raise ConfigError(
                "--step-policy paper scores the whole output, so --step-scope thinking "
                "contradicts it: leave --step-scope out, or use --step-policy fair"
            )
        if self.admit is not None:
            _check_choice("--step-admit", self.admit, ADMISSIONS)
        if self.policy == "paper" and self.admit == "fair":
            raise ConfigError(
                "--step-policy paper knows no groups, so --step-admit fair contradicts it: leave "
                "--step-admit out, or use --step-policy fair"
            )
        self._check_watermark()
        self._check_refill()
        self._check_limits()
        for flag, value in (
            ("--step-min-survivors", self.min_survivors),
            ("--step-min-steps", self.min_steps),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{flag} must be an integer of at least 1, not {value!r}")
        if not isinstance(self.delimiters, tuple) or not all(
            isinstance(text, str) and text for text in self.delimiters
        ):
            raise ConfigError(
                f"--step-delimiter takes one or more non-empty strings, not {self.delimiters!r}"
            )

        if not isinstance(self.traces, int) or isinstance(self.traces, bool) or self.traces < 1:
            raise ConfigError(
                f"--step-traces must be an integer of at least 1, not {self.traces!r}"
            )
        _check_choice("--step-vote", self.vote, VOTES)
        _check_choice("--step-extract", self.extract, EXTRACTORS)
        self._check_effort()
        self._check_sample()
        _check_choice("--step-pruned", self.pruned, PRUNED_MODES)
        _check_choice("--step-page", self.page, PAGES)
        _check_choice("--step-log", self.log, LOGS)
        if not isinstance(self.embedding, str) or not self.embedding:
            raise ConfigError(f"--step-embedding must be a name, not {self.embedding!r}")
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < 100:
            raise ConfigError(f"--step-temperature must be above 0, not {self.temperature!r}")

    def _check_effort(self) -> None:
        effort = self.effort
        if isinstance(effort, str):
            try:
                effort = float(effort)
            except ValueError:
                _check_choice("--step-effort", effort, EFFORTS)
                return
            object.__setattr__(self, "effort", effort)  # a flag's value is text
        number = isinstance(effort, int | float) and not isinstance(effort, bool)
        if not (number and 0 <= effort <= 1):
            raise ConfigError(
                f"--step-effort must be {', '.join(EFFORTS)} or a number from 0 to 1, not "
                f"{effort!r}"
            )

    def _check_watermark(self) -> None:
        share = self.prune_at
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not (number and 0 < share <= 1):
            raise ConfigError(
                f"--step-prune-at must be a share of the KV pool, above 0 and at most 1, not "
                f"{share!r}"
            )
        if self.policy == "paper" and share < 1:
            raise ConfigError(
                "--step-policy paper prunes when memory is full, so --step-prune-at contradicts "
                "it: leave --step-prune-at out, or use --step-policy fair"
            )

    def _check_refill(self) -> None:
        _check_choice("--step-refill", self.refill, REFILL_FLAGS)
        if self.refill != REFILL_OFF and (self.policy == "paper" or self.capture):
            other = (
                "--step-capture prunes nothing"
                if self.capture
                else "--step-policy paper knows no groups"
            )
            raise ConfigError(
                f"{other}, so --step-refill {self.refill} contradicts it: leave one of them out"
            )

    def _check_sample(self) -> None:
        share, limit = self.sample_share, self.sample_limit
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not (number and 0 < share <= 1):
            raise ConfigError(
                "--step-sample-share must be a share of the groups, above 0 and at most 1, not "
                f"{share!r}"
            )
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ConfigError(
                f"--step-sample-limit must be a number of megabytes, at least 1, not {limit!r}"
            )
        if not isinstance(self.sample, str):
            raise ConfigError(f"--step-sample must be a folder, not {self.sample!r}")
        if not self.sample:
            for name in ("sample_share", "sample_limit"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    flag = "--step-" + name.replace("_", "-")
                    raise ConfigError(f"{flag} needs --step-sample DIR, where groups are kept")
        elif self.capture or self.policy == "paper":
            other = (
                "--step-capture serves `collect`, which samples by itself"
                if self.capture
                else "--step-policy paper knows no groups, and so spares none"
            )
            raise ConfigError(f"{other}, so --step-sample contradicts it: leave one of them out")

    def _check_limits(self) -> None:
        if self.policy == "paper" and self.max_groups != OFF:
            raise ConfigError(
                "--step-policy paper knows no groups, so --step-max-groups contradicts it: leave "
                "--step-max-groups out, or use --step-policy fair"
            )
        for flag, value in (
            ("--step-max-groups", self.max_groups),
            ("--step-max-batch", self.max_batch),
        ):
            if value not in (AUTO, OFF) and _number(value) is None:
                raise ConfigError(
                    f"{flag} must be {AUTO}, {OFF} or an integer of at least 1, not {value!r}"
                )

    @property
    def by_certainty(self) -> bool:
        """Whether the model's own certainty scores the steps, as there is no scorer."""
        return self.scorer == NO_SCORER

    @property
    def scorer_file(self) -> str:
        """The scorer's path; empty without one."""
        return "" if self.by_certainty else self.scorer

    @property
    def scores_all(self) -> bool:
        """Whether steps after the think-end token count too."""
        return self.policy == "paper" or self.scope == "all"

    def effective(self) -> dict[str, Any]:
        """Every setting, with what a default that depends on others comes to."""
        return {
            **asdict(self),
            "scope": "all" if self.scores_all else "thinking",
            "admit": "fair" if self.makes_room else "queue",
            "max_groups": self.group_limit,
            "max_batch": self.batch_limit,
        }

    @property
    def makes_room(self) -> bool:
        """Whether traces are pruned for requests that wait, not only for those that run."""
        return self.policy == "fair" and self.admit != "queue" and not self.capture

    @property
    def group_limit(self) -> int | str:
        """Groups that run at once: a number, AUTO or OFF."""
        if self.policy == "paper" or self.capture:
            return OFF
        return _number(self.max_groups) or str(self.max_groups)

    @property
    def batch_limit(self) -> int | str:
        """Requests at which no further trace starts: a number, AUTO or OFF."""
        return OFF if self.capture else _number(self.max_batch) or str(self.max_batch)


def _number(limit: object) -> int | None:
    """The number that a limit is, if it is one of at least 1."""
    if isinstance(limit, str) and limit.isascii() and limit.isdecimal() and len(limit) < 10:
        limit = int(limit)
    return limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else None


def _check_choice(flag: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, not {value!r}{near}")


def unescape(text: str) -> str:
    r"""Text of a command line in which \n, \t and \\ are escapes."""
    # A marker protects an escaped backslash from the two replacements that follow it.
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")


def escape(text: str) -> str:
    """The inverse of :func:`unescape`."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def add_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--enable-step`` and one flag per field of :class:`StepConfig`, in their own group."""
    group = parser.add_argument_group(
        "STEP", "Score reasoning traces from hidden states; prune the worst when the KV pool fills."
    )
    group.add_argument("--enable-step", action="store_true", help="Turn STEP pruning on.")
    for option in fields(StepConfig):
        name = f"step_{option.name}"
        flag = option.metadata.get("flag", "--" + name.replace("_", "-"))
        more: dict[str, Any] = {}
        if option.name == "delimiters":
            more = {"nargs": "+", "type": unescape}
        elif isinstance(option.default, bool):
            more = {"action": "store_true"}
        elif isinstance(option.default, int | float):
            more = {"type": partial(_lenient, type(option.default))}
        help_text = option.metadata["help"]
        if option.default:
            help_text += f" Default: {option.default}."
        # Choices are checked by StepConfig: argparse would print SGLang's whole usage before its
        # one line.
        if "choices" in option.metadata:
            more["metavar"] = "{" + ",".join(option.metadata["choices"]) + "}"
        elif "metavar" in option.metadata:
            more["metavar"] = option.metadata["metavar"]
        group.add_argument(
            flag, dest=name, default=option.default, help=help_text.replace("%", "%%"), **more
        )


def _lenient(kind: type, text: str) -> Any:
    """The number, or the text as it is, which :class:`StepConfig` refuses in one line."""
    try:
        return kind(text)
    except ValueError:
        return text


def take_options(options: dict[str, Any]) -> StepConfig | None:
    """Remove STEP's entries from ``options`` and build the configuration they ask for.

    Args:
        options: engine keyword arguments or a parsed namespace's ``vars``: ``enable_step`` and
            ``step_<field>``. Changed in place.

    Returns:
        The configuration, or None when STEP was not asked for.

    Raises:
        ConfigError: a value is wrong, or STEP options came without ``enable_step``.
    """
    enabled = options.pop("enable_step", False)
    if not isinstance(enabled, bool):
        raise ConfigError(f"enable_step must be True or False, not {enabled!r}")
    given: dict[str, Any] = {}
    for option in fields(StepConfig):
        key = f"step_{option.name}"
        # The singular is the flag's name, and what a caller of the engine will try first.
        for alias in (key, "step_delimiter") if option.name == "delimiters" else (key,):
            if alias in options:
                value = options.pop(alias)
                # By representation, because True equals 1.
                if value is not None and repr(value) != repr(option.default):
                    given[option.name] = value
    if not enabled:
        if given:
            raise ConfigError(
                f"{_flags(given)} given without --enable-step (enable_step=True): add it, "
                "or leave the STEP options out"
            )
        return None
    if "delimiters" in given:
        value = given["delimiters"]
        if not isinstance(value, str) and not isinstance(value, (list, tuple)):
            raise ConfigError(
                f"--step-delimiter takes one or more non-empty strings, not {value!r}"
            )
        given["delimiters"] = (value,) if isinstance(value, str) else tuple(value)
    return StepConfig(**given)


def _flags(given: Mapping[str, Any]) -> str:
    return ", ".join("--step-" + name.replace("_", "-").rstrip("s") for name in given)
