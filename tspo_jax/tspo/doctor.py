"""Rules that say in words, with numbers, why a run learns nothing or slowly: one rule an illness."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tspo_jax.checkpoints import weights
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.runs.finding import Finding

KINDS = ("general", "specific")
MIN_STEPS = 3  # with a rollout; fewer say nothing


class Log:
    """The rows of a run's steps with a rollout (not those of a warm start), and its config."""

    def __init__(self, rows: Sequence[Mapping], config: Mapping):
        self.rows = [row for row in rows if any(f"reward/{kind}" in row for kind in KINDS)]
        self.config = config
        self.edge = max(MIN_STEPS, min(50, len(self.rows) // 5))  # rows that are the start or the end of a run

    def values(self, name: str, where: slice = slice(None)) -> np.ndarray:
        """A metric where it was measured; nan where it was not finite."""
        rows = self.rows[where]
        return np.array([math.nan if row[name] is None else row[name] for row in rows if name in row], float)

    def mean(self, name: str, where: slice = slice(None)) -> float:
        """nan where nothing was measured."""
        values = self.values(name, where)
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else math.nan

    @property
    def first(self) -> slice:
        return slice(self.edge)

    @property
    def last(self) -> slice:
        return slice(-self.edge, None)

    def k(self, where: slice) -> float:
        """Mean number of frames that were picked."""
        if self.config["policy"].get("random_k"):
            return float(np.mean(self.config["policy"]["random_k"]))
        picks = [
            self.config["data"][kind]["k"] for row in self.rows[where] for kind in KINDS if f"reward/{kind}" in row
        ]
        return float(np.mean(picks))


# ---- rules -----------------------------------------------------------------------------------------------


def dead_groups(log: Log) -> Iterator[Finding]:
    share = log.mean("dead_groups", log.last)
    if share > 0.7:
        yield Finding(
            "dead_groups",
            f"In {share:.0%} of the groups all rewards were equal in the last steps: they teach nothing. Draw larger "
            "groups (policy.group_size), add a graded reward (data.general.probability), or leave out questions "
            "that are always answered alike.",
            {"share": share},
        )


def one_sided_answers(log: Log) -> Iterator[Finding]:
    for kind in KINDS:
        accuracy = log.mean(f"accuracy/{kind}")
        if accuracy > 0.95:
            yield Finding(
                f"always_right/{kind}",
                f"{accuracy:.0%} of the {kind} answers are right whatever frames are shown: these questions can be "
                "answered without the video, or are too easy. Filter them.",
                {"accuracy": accuracy},
            )
        elif accuracy < 0.05:
            yield Finding(
                f"always_wrong/{kind}",
                f"Only {accuracy:.1%} of the {kind} answers are right: the answerer cannot do these questions, or the "
                "prompt template (answerer.template) or the solutions do not fit. Read some answers with "
                "python -m tspo_jax.answer.",
                {"accuracy": accuracy},
            )


def unparsed(log: Log) -> Iterator[Finding]:
    share = log.mean("unparsed")
    if share > 0.2:
        yield Finding(
            "unparsed",
            f"{share:.0%} of the answers name no option letter, so they count as wrong. Raise answerer.max_new_tokens "
            f"(now {log.config['answerer']['max_new_tokens']}) or correct answerer.template.",
            {"share": share},
        )


def sharp_from_the_start(log: Log) -> Iterator[Finding]:
    k, unique = log.k(log.first), log.mean("unique_frames", log.first)
    group, spread, tau = (
        log.config["policy"]["group_size"],
        log.mean("cosine_spread", log.first),
        log.mean("tau", log.first),
    )
    if unique < 1.3 * k:
        yield Finding(
            "too_sharp_from_the_start",
            f"In the first steps the {group} draws of a group had {unique:.1f} different frames together, for {k:.0f} "
            "picks each: nearly the same frames every time, so there is nothing to compare. The cosines of a video "
            f"spread by {spread:.3f}, {spread / tau:.0f} times tau ({tau:.3f}); raise policy.tau_start, to about "
            f"{spread:.2g}.",
            {"unique_frames": unique, "k": k, "cosine_spread": spread, "tau": tau},
        )


def entropy_collapse(log: Log) -> Iterator[Finding]:
    before, after = (math.exp(log.mean("score_entropy", where)) for where in (log.first, log.last))
    k = log.k(log.last)
    if after < k / 2 and after < before / 4:
        yield Finding(
            "entropy_collapse",
            f"The scores spread over {before:.0f} frames at the start (e to their entropy) and over {after:.1f} at the "
            f"end, fewer than the {k:.0f} that are picked: the policy no longer explores. Lower "
            "optimizer.learning_rate, or add policy.entropy or policy.kl.",
            {"frames_first": before, "frames_last": after, "k": k},
        )


def low_temperature(log: Log) -> Iterator[Finding]:
    ratios = [log.mean("cosine_spread", where) / log.mean("tau", where) for where in (log.first, log.last)]
    k, unique = log.k(log.last), log.mean("unique_frames", log.last)
    explored_at_first = log.mean("unique_frames", log.first) >= 1.3 * log.k(log.first)
    if explored_at_first and unique < 1.3 * k and ratios[1] > 2 * ratios[0]:
        yield Finding(
            "temperature_too_low",
            f"tau fell to {log.mean('tau', log.last):.4f}, where the cosines of a video spread by {ratios[1]:.0f} tau; "
            f"the draws of a group then have {unique:.1f} different frames for {k:.0f} picks. Raise policy.tau_end.",
            {"tau": log.mean("tau", log.last), "spread_in_tau": ratios[1], "unique_frames": unique},
        )


def gradient_norm(log: Log) -> Iterator[Finding]:
    norms, limit = log.values("grad_norm"), log.config["optimizer"]["max_grad_norm"]
    if np.isnan(norms).any():
        step = next(row["step"] for row in log.rows if row.get("grad_norm", 0) is None)
        yield Finding("not_finite", f"The gradient was not finite at step {step}.", {"step": step})
        return
    median = float(np.median(norms))
    if median > 100 * limit:
        yield Finding(
            "gradient_too_large",
            f"The gradient's norm is {median:.3g} in most steps, {median / limit:.0f} times what it is clipped to "
            f"(optimizer.max_grad_norm {limit}): every step is cut to its direction. Raise tau or lower the rewards' "
            "weights.",
            {"median": median},
        )
    elif median < 1e-6 and log.mean("dead_groups") < 0.5:
        yield Finding(
            "no_gradient",
            f"Rewards differ within groups, but the gradient's norm is {median:.1e}: the agent's scores do not "
            "depend on its parameters. Is the agent that of agent.init, and are the features not all zero?",
            {"median": median},
        )


def input_bound(log: Log) -> Iterator[Finding]:
    steady = slice(len(log.rows) // 2, None)
    idle = log.values("device_idle", steady)
    if idle.size and (share := float(np.median(idle))) > 0.3:
        seconds = {part: float(np.median(log.values(f"seconds/{part}", steady))) for part in ("data", "fetch")}
        yield Finding(
            "input_bound",
            f"The device waits {share:.0%} of the time for the host, which needs {seconds['data']:.2f} s of a step for "
            f"batches (data.workers) and {seconds['fetch']:.2f} s for the picked frames (data.decode_threads, a faster "
            "disk, smaller frames in predecode). answerer.question_chunk fetches frames while other questions are "
            "answered, policy.stale_steps=1 one step ahead.",
            {"device_idle": share} | seconds,
        )


def recompilations(log: Log) -> Iterator[Finding]:
    counts = log.values("compilations", slice(len(log.rows) // 2, None))
    steps = int((np.diff(counts) > 0).sum())
    if steps >= 3 and steps > 0.1 * len(counts):
        yield Finding(
            "recompilations",
            f"Programs were compiled in {steps} of the last {len(counts)} steps. Shapes keep changing: give fewer "
            "data.buckets or policy.random_k.",
            {"steps": steps},
        )


def stale_features(log: Log) -> Iterator[Finding]:
    """Where the run's store and CLIP are on this machine."""
    folder, clip = log.config["data"]["store"], log.config["agent"]["clip"]
    if not (Path(folder) / "store.json").is_file() or not Path(clip).is_dir():
        return
    store = FrameStore(folder, weights.checkpoint_identity(clip))
    names = store.names()
    stale = [name for name in names if not store.has_features(name)]
    if stale:
        yield Finding(
            "stale_features",
            f"{len(stale)} of {len(names)} videos in {folder} have no features of {clip} as it is now, or features of "
            f"older frames, e.g. {stale[0]}: what was trained on is not what is there. Run python -m "
            "tspo_jax.predecode again.",
            {"videos": len(stale)},
        )


RULES: tuple[Callable[[Log], Iterator[Finding]], ...] = (
    dead_groups,
    one_sided_answers,
    unparsed,
    sharp_from_the_start,
    entropy_collapse,
    low_temperature,
    gradient_norm,
    input_bound,
    recompilations,
    stale_features,
)


def diagnose(rows: Sequence[Mapping], config: Mapping) -> list[Finding]:
    """What is wrong with a run.

    Args:
      rows: of its metrics.jsonl (metrics.read_rows).
      config: its config.json.
    Raises: ValueError where there are too few steps to say anything.
    """
    log = Log(rows, config)
    if len(log.rows) < MIN_STEPS:
        raise ValueError(f"the log has {len(log.rows)} steps with a rollout; at least {MIN_STEPS} are needed")
    return [finding for rule in RULES for finding in rule(log)]
