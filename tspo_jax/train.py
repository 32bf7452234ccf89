"""Trains the temporal agent by TSPO with a frozen Video-MLLM.

    python -m tspo_jax.train --config=configs/toy.py [--config.optimizer.learning_rate=1e-4 ...] [--run_dir=runs/toy]

A step, with B questions, T candidate frames, G draws of K frames each:

    batch    data/loader.py   question rows -> features [B,T,D], mask, text feature [B,D], prompt, answer, needle mask
    sample   programs.py      agent scores every frame; G draws of K frames without replacement -> [B,G,K]
    fetch    data/            only the drawn frames are read and decoded, each once -> uint8 [B,U,S,S,3]
    answer   rollout.py       the frozen MLLM answers all B*G prompts as one batch -> tokens [B,G,new]
    reward   rewards.py       answers and draws -> [B,G]
    update   programs.py      rewards relative to their group's mean -> one optimiser step on the agent

sample, answer and update are compiled programs, once per kind of sample and bucket of T; nothing else runs on the
device. The next batch is loaded meanwhile, and metrics are read from the device one step late.

Running the same command again resumes from the newest checkpoint, exactly: randomness is a function of (seed, step,
question index), and the place of the data iterator is part of the checkpoint. After SIGTERM the step in progress is
finished and saved, and the exit status is 75. `python -m tspo_jax.doctor` reads the log. Metrics, per step:
reward/KIND, accuracy/KIND, location/KIND (means; KIND is general or specific), unparsed (share of answers without an
option letter), advantage_std, dead_groups (share of groups whose rewards are all equal: they teach nothing), grad_norm
(before clipping), score_entropy (nats), tau, learning_rate, loss (zero by construction), unique_frames (of the G * K
drawn ones of a question), cosine_spread (standard deviation of a video's CLIP similarities to its question; the first
logits spread by twice that over tau), seconds/{data,sample,fetch,answer,update}, compilations (so far). Steps of a warm
start have label_loss instead of what needs a rollout.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from transformers import PreTrainedTokenizerBase

from tspo_jax import config as config_module
from tspo_jax import entry_point, programs, prompts, sharding, weights
from tspo_jax.checkpoints import Answerer, load_agent, load_answerer, load_clip
from tspo_jax.config import MAY_DIFFER, Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.loader import Batch, Loader, LoaderConfig, fetch_frames
from tspo_jax.data.needle import NeedleConfig
from tspo_jax.data.questions import Question, read_questions
from tspo_jax.metrics import CompilationCounter, MetricsLog, Stopwatch, Terminal
from tspo_jax.preemption import EXIT_STATUS, Preemption
from tspo_jax.rewards import group_rewards, option_letter
from tspo_jax.rollout import Rollout, unique_frames
from tspo_jax.run_folder import Checkpoints, TrainState, check_run, in_use, write_run_config

COLUMNS = {  # of the table on the terminal: metric -> heading
    "step": "step",
    "reward/general": "general",
    "reward/specific": "specific",
    "location/specific": "location",
    "dead_groups": "dead",
    "unparsed": "unparsed",
    "score_entropy": "entropy",
    "grad_norm": "gradient",
    "tau": "tau",
    **{f"seconds/{part}": f"{part}" for part in ("data", "sample", "fetch", "answer", "update")},
    "compilations": "programs",
}
OPTION_REWARDS = ("probability", "margin")  # those that need the first token's logits
REWARD_NAMES = {"total": "reward"} | {  # of group_rewards -> metric
    name: name for name in ("accuracy", "location", "coverage", *OPTION_REWARDS)
}
LOSS_NOTE = (
    "The loss is 0 by construction: rewards count relative to their group's mean, so only its gradient says something. "
    "Watch the rewards rise; groups whose rewards are all equal (dead) teach nothing."
)
PROMPT_MULTIPLE = 32  # prompts are padded to the longest one, rounded up to this


def train(config: Config, run_dir: Path, devices: Sequence[jax.Device] | None = None) -> bool:
    """Trains until `config.num_steps` updates are done, from the newest checkpoint of `run_dir` if it has one.

    Runs on `devices`, by default on all that there are. Returns False where SIGTERM stopped it before; then the last
    step is saved.
    """
    mesh = sharding.make_mesh(config.mesh.axes, devices or jax.devices())
    sharding.check_batch_size(mesh, config.batch_size)
    check_run(run_dir, dataclasses.asdict(config), MAY_DIFFER)

    # What is frozen: the answerer, and the questions as CLIP and the answerer read them.
    questions, _ = read_questions(config.data.questions)
    if config.policy.warm_start_steps and not any(q.evidence or q.kind == "specific" for q in questions):
        raise ValueError(
            f"config.policy.warm_start_steps is {config.policy.warm_start_steps}, but {config.data.questions} has "
            "nothing to learn from: neither evidence nor specific questions"
        )
    clip = load_clip(config.agent.clip)
    store = FrameStore(config.data.store, clip.identity)
    width, text = clip.width, clip.text_features([question.query for question in questions])
    del clip  # its weights leave the device
    where = sharding.answerer_sharding(
        mesh, weights.read_config(config.answerer.folder), split_over_data=config.mesh.split_over_data
    )
    a = config.answerer
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video)
    check_frame_sizes(store, answerer)
    rollout = Rollout.of(
        answerer,
        max_new_tokens=config.answerer.max_new_tokens,
        encode_chunk=config.answerer.encode_chunk,
        prefill_chunk=config.answerer.prefill_chunk,
        mesh=mesh,
        return_first_logits=needs_options(config),
    )
    texts = [prompts.render(question.question, a.template or answerer.template) for question in questions]
    ids = [prompts.tokenize(text, answerer.tokenizer) for text in texts]
    prompt_ids, prompt_lengths = prompts.pad(ids, answerer.generation.pad_token_id, PROMPT_MULTIPLE)
    per_question = {"text": text, "prompt_ids": prompt_ids, "prompt_lengths": prompt_lengths}
    if needs_options(config):
        per_question["options"] = option_tokens(questions, config.answerer.option_text, answerer.tokenizer)

    # What is trained.
    graphdef, agent = load_agent(
        config.agent.init or config.agent.clip,
        window=config.agent.window,
        num_heads=config.agent.num_heads,
        seed=config.seed,
        kind=config.agent.kind,
    )
    check_width(agent, width, config.agent.init)
    state = TrainState(agent, jax.jit(programs.make_optimizer(config).init)(agent))
    state = sharding.put_replicated(mesh, state)
    sample = programs.make_sample(graphdef, config, mesh)
    update = programs.make_update(graphdef, config, mesh)
    warm_start = programs.make_warm_start(graphdef, config, mesh)
    initial = sharding.put_replicated(mesh, agent) if config.policy.kl else None

    with ExitStack() as stack:
        loader = Loader(store, questions, loader_config(config), config.seed, per_question, *sharding.data_slice(mesh))
        stack.enter_context(loader)
        if jax.process_index() == 0:
            stack.enter_context(in_use(run_dir))
            write_run_config(run_dir, dataclasses.asdict(config))
        checkpoints = stack.enter_context(Checkpoints(run_dir, config.keep_checkpoints))
        start = checkpoints.latest_step() or 0
        if start:
            state, iterator = checkpoints.restore(start, like=state)
            loader.set_state(iterator)
        report = stack.enter_context(Reporter(run_dir, config, start))
        if start >= config.num_steps:
            report.note(f"{run_dir}: all {config.num_steps} steps are done")
            return True
        report.note(f"{run_dir}: resuming after step {start}" if start else LOSS_NOTE)
        pool = stack.enter_context(ThreadPoolExecutor(config.data.decode_threads))
        preemption = stack.enter_context(Preemption())

        profiled = range(start + 2, start + 2 + config.profile_steps)
        profile = stack.enter_context(ExitStack())

        def finish_step() -> bool:
            """Whether the run must stop after this step."""
            report.start_row(step + 1, rows, metrics, watch)
            if profiled and step == profiled[-1]:
                profile.close()
            must_stop = preemption.must_stop(step + 1)
            if must_stop or (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
                report.finish_row()
                checkpoints.save(step + 1, state, loader.get_state())
            return must_stop and step + 1 < config.num_steps

        for step in range(start, config.num_steps):
            if profiled and step == profiled[0]:
                profile.enter_context(jax.profiler.trace(str(run_dir / "profile")))
            watch = Stopwatch()
            with watch("data"):
                rows = next(loader)
                batch = sharding.put_batch(mesh, {name: rows[name] for name in ("index", "features", "text", "mask")})
            report.finish_row()  # of the last step, whose update has had the time of loading to run
            if step < config.policy.warm_start_steps:
                with watch("update"):
                    labels = sharding.put_batch(mesh, evidence_labels(questions, store, loader.names, rows))
                    state, metrics = warm_start(state, batch, labels, np.int32(step))
                if finish_step():
                    break
                continue
            with watch("sample"):
                k = step_k(config, step) or rows["k"]
                draws = sample(state.agent, batch, np.int32(step), k=k)
                picks = np.sort(sharding.local_rows(draws), axis=-1)
            with watch("fetch"):
                candidates, index = unique_frames(picks)
                video, frame = (np.take_along_axis(rows[name], candidates, axis=1) for name in ("video", "frame"))
                frames = fetch_frames(store, loader.names, video, frame, answerer.processor.crop, pool)
            with watch("answer"):
                shown = sharding.put_batch(mesh, (frames, index, rows["prompt_ids"], rows["prompt_lengths"]))
                answers = rollout(answerer.params, *shown)
                options = None
                if needs_options(config):
                    options = programs.option_log_probs(answers.first_logits, sharding.put_batch(mesh, rows["options"]))
                    options = sharding.local_rows(jax.device_put(options, sharding.over_questions(mesh)))
                answers = jax.device_put((answers.tokens, answers.lengths), sharding.over_questions(mesh))
                completions = prompts.decode(*map(sharding.local_rows, answers), answerer.tokenizer)
            with watch("update"):
                solutions = [questions[i].answer for i in rows["index"]]
                measured = measure(config, rows, picks, index, completions, solutions, options)
                measured = sharding.put_batch(mesh, measured)
                state, metrics = update(state, batch, draws, measured, np.int32(step), initial)
            if finish_step():
                break
        else:
            return True
        report.note(f"{run_dir}: stopped by SIGTERM, saved after step {step + 1}; run the same command to go on")
        return False


def start_distributed(config: Config) -> None:
    """Joins the other processes, where the config says that there are any; before any other use of jax."""
    d = config.distributed
    if d.enabled:
        count, index = (n if n >= 0 else None for n in (d.num_processes, d.process_id))
        jax.distributed.initialize(d.coordinator or None, count, index)


def loader_config(config: Config) -> LoaderConfig:
    data, specific = config.data, config.data.specific
    if any(k < 1 for k in config.policy.random_k):
        raise ValueError(f"config.policy.random_k is {config.policy.random_k}: at least one frame has to be picked")
    return LoaderConfig(
        batch_size=config.batch_size,
        picks={
            "general": max((data.general.k, *config.policy.random_k)),
            "specific": max((specific.k, *config.policy.random_k)),
        },
        buckets=data.buckets,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        needle=NeedleConfig(
            group_frames=specific.group_frames,
            min_true_groups=specific.min_true_groups,
            max_true_groups=specific.max_true_groups,
            distractor_groups=specific.distractor_groups,
            max_distractor_groups=specific.max_distractor_groups,
        ),
        num_workers=data.workers,
    )


def measure(
    config: Config,
    rows: Batch,
    picks: np.ndarray,
    index: np.ndarray,
    completions: Sequence[Sequence[str]],
    solutions: Sequence[str],
    option_log_probs: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """What the host learns from a step: rewards (by name, and `total`) and `unparsed` [B,G], `unique_frames` and
    `cosine_spread` [B].

    picks are int [B,G,K], index is theirs from `unique_frames`, completions are [B][G], solutions [B],
    option_log_probs float [B,G,O] where a reward needs them.
    """
    rewards = group_rewards(
        rows["kind"],
        completions,
        solutions,
        picks,
        rows["needle_mask"],
        reward_weights(config),
        rows["mask"].sum(axis=1),
        option_log_probs,
    )
    unparsed = [[option_letter(completion) is None for completion in group] for group in completions]
    encoded = 1 + index.max(axis=(1, 2))
    return {
        **rewards,
        "unparsed": np.array(unparsed, np.float32),
        "unique_frames": encoded.astype(np.float32),
        "cosine_spread": cosine_spread(rows),
    }


def cosine_spread(rows: Batch) -> np.ndarray:
    """Standard deviation of the CLIP similarities within each video: float32 [B]."""
    features, text = rows["features"], rows["text"]
    norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(text, axis=-1, keepdims=True)
    cosines = np.einsum("btd,bd->bt", features, text) / np.maximum(norms, 1e-8)
    return np.std(cosines, axis=1, where=rows["mask"])


def reward_weights(config: Config) -> dict[str, dict[str, float]]:
    """Of `group_rewards`: the paper's rewards always, further ones where they count."""
    paper = {"general": ("accuracy",), "specific": ("accuracy", "location")}
    weights_of_kind = {}
    for kind, always in paper.items():
        fields = dataclasses.asdict(getattr(config.data, kind))
        further = [name for name in ("coverage", *OPTION_REWARDS) if fields[name]]
        weights_of_kind[kind] = {name: fields[name] for name in (*always, *further)}
    return weights_of_kind


def needs_options(config: Config) -> bool:
    return any(name in weights for weights in reward_weights(config).values() for name in OPTION_REWARDS)


def option_tokens(questions: Sequence[Question], text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token that an answer with each option begins with: int32 [questions, O], -1 where there are fewer options.

    Args:
      text: how answers begin, with {letter} and {option}, e.g. "{letter}", or " {option} {letter}".
    Raises: ValueError where two options of a question begin alike.
    """
    rows = []
    for question in questions:
        begins = [text.format(letter="ABCDEFGHIJ"[i], option=option) for i, option in enumerate(question.options)]
        row = [tokenizer(begin, add_special_tokens=False)["input_ids"][0] for begin in begins]
        if len(set(row)) < len(row):
            raise ValueError(
                f"{question.source}: two options begin with the same token when written as answerer.option_text "
                f"{text!r}; the rewards probability and margin cannot tell them apart"
            )
        rows.append(row)
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens


def evidence_labels(questions: Sequence[Question], store: FrameStore, names: Sequence[str], rows: Batch) -> np.ndarray:
    """The frames to learn from in a warm start: those of the evidence, else of the target video of a needle sample.

    Returns: bool [B,T]; a row without any is a question that has neither.
    """
    labels = rows["needle_mask"].copy()
    for row, i in enumerate(rows["index"]):
        question = questions[i]
        if not question.evidence:
            continue
        is_target = rows["mask"][row] & (rows["video"][row] == names.index(question.video))
        times = store.video(question.video).timestamps[np.where(is_target, rows["frame"][row], 0)]
        shown = np.any([(times >= start) & (times < end) for start, end in question.evidence], axis=0)
        labels[row] = is_target & shown
    return labels


def step_k(config: Config, step: int) -> int | None:
    """K of a step where it is random: a function of the seed and the step."""
    choices = config.policy.random_k
    return int(np.random.default_rng((config.seed, step)).choice(choices)) if choices else None


def check_width(agent: dict, width: int, folder: str) -> None:
    found = agent["mlp"]["linear_1"]["bias"].shape[0]
    if found != width:
        raise ValueError(
            f"agent.init={folder}: an agent of width {found}, but agent.clip gives features of width {width}"
        )


def check_frame_sizes(store: FrameStore, answerer: Answerer) -> None:
    """Raises ValueError where videos would be shown in different sizes: a batch, and a needle sample, has one."""
    if answerer.processor.frame_size:
        return
    videos = map(store.video, store.names())
    sizes = {answerer.processor.size_of(video.height, video.width) for video in videos}
    if len(sizes) > 1:
        found = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"the videos of {store.folder} would be shown in several sizes ({found}); give all frames one, "
            "e.g. --config.answerer.video.frame_size='(392, 728)'"
        )


class NotFiniteError(ValueError):
    """A step whose metrics are nan or infinite."""


class Reporter(ExitStack):
    """Writes a row of metrics per step (see the module's text), in the first process only.

    The values of an update are waited for one step late, after the next batch was loaded, so that the host does not
    stand still while the device works.
    """

    def __init__(self, run_dir: Path, config: Config, start: int):
        super().__init__()
        is_first = jax.process_index() == 0
        self._run_dir = run_dir
        self._log_every = config.log_every
        self._log = self.enter_context(MetricsLog(run_dir, start)) if is_first else None
        self._terminal = self.enter_context(Terminal(config.num_steps, start, COLUMNS, quiet=not is_first))
        self._compilations = self.enter_context(CompilationCounter())
        self._pending = None
        self._recent: list[dict] = []  # rows since the last line on the terminal
        self.note = self._terminal.note

    def start_row(self, step: int, rows: Batch, metrics: dict[str, jax.Array], watch: Stopwatch) -> None:
        self._pending = step, rows, metrics, watch

    def finish_row(self) -> None:
        """Writes the row that was started, if there is one.

        Raises NotFiniteError where a metric is nan or infinite; the batch is then in a file of the run folder.
        """
        if self._pending is None:
            return
        step, rows, metrics, watch = self._pending
        kind = rows["kind"]
        self._pending = None
        with watch("update"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row = {"step": step}
        row |= {f"{REWARD_NAMES[name]}/{kind}": values.pop(name) for name in REWARD_NAMES if name in values}
        row |= values | {f"seconds/{part}": seconds for part, seconds in watch.seconds.items()}
        row |= {"compilations": self._compilations.count}
        if self._log:
            self._log.write(row)
        if broken := [name for name, value in row.items() if not np.isfinite(value)]:
            path = self._run_dir / f"not_finite_step_{step}_process_{jax.process_index()}.npz"
            np.savez(path, **rows)
            raise NotFiniteError(
                f"step {step}: {', '.join(broken)} not finite; its batch is in {path}, and no checkpoint holds this "
                "step. A lower optimizer.learning_rate may help; features that are not finite do not"
            )
        self._recent.append(row)
        if step % self._log_every == 0:
            names = dict.fromkeys(name for row in self._recent for name in row)
            values = {name: [row[name] for row in self._recent if name in row] for name in names}
            means = {name: float(np.mean(v)) if isinstance(v[0], float) else v[-1] for name, v in values.items()}
            self._terminal.row(means)
            self._recent = []
        self._terminal.advance(step)


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_string("run_dir", "", "Folder of the run; default: runs/<name of the config file>.")


def main() -> int:
    config = config_module.from_flags()
    start_distributed(config)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    is_done = train(config, Path(flags.FLAGS.run_dir or f"runs/{name}"))
    return 0 if is_done else EXIT_STATUS


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=config_module.check_overrides)
