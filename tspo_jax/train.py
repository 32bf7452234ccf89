"""Trains the temporal agent by TSPO with a frozen Video-MLLM.

    python -m tspo_jax.train --config=configs/toy.py [--config.optimizer.learning_rate=1e-4 ...] [--run_dir=runs/toy]

A step, with B questions, T candidate frames, G draws of K frames each:

    batch    data/loader.py   question rows -> features [B,T,D], mask, text feature [B,D], prompt, answer, needle mask
    sample   programs.py      agent scores every frame; G draws of K frames without replacement -> [B,G,K]
    fetch    data/            only the drawn frames are read and decoded, each once -> uint8 [B,U,S,S,3]
    answer   rollout.py       the frozen MLLM answers all B*G prompts as one batch -> tokens [B,G,new]
    reward   rewards.py       answers and draws -> [B,G]
    update   programs.py      rewards relative to their group's mean -> one optimiser step on the agent

sample, answer and update are compiled before the first step, once per kind of sample and bucket of T; nothing else
runs on the device. The next batch is loaded meanwhile, metrics are read from the device one step late, and frames are
fetched while other questions are answered (answerer.question_chunk). With policy.stale_steps=1 the next picks are drawn
before the update and fetched while the MLLM answers; the update then corrects for the agent that drew.

Running the same command again resumes from the newest checkpoint, exactly: randomness is a function of (seed, step,
question index), and the place of the data iterator is part of the checkpoint. After SIGTERM the step in progress is
finished and saved, and the exit status is 75; where another process of the run ended, it is 76. `python -m
tspo_jax.doctor` reads the log. Metrics, per step: reward/KIND, accuracy/KIND, location/KIND (means; KIND is general or
specific), unparsed (share of answers without an option letter), advantage_std, dead_groups (share of groups whose
rewards are all equal: they teach nothing), grad_norm (before clipping), score_entropy (nats), tau, learning_rate, loss
(zero by construction), unique_frames (of the G * K drawn ones of a question), cosine_spread (standard deviation of a
video's CLIP similarities to its question; the first logits spread by twice that over tau), held_out/METHOD (accuracy,
where it was measured), seconds/{data,sample,fetch,answer,reward,update} (of the host), device_idle (share of the time
in which the device waited for the host), steps_per_second, roofline_share, compilations (so far). Steps of a warm start
have label_loss instead of what needs a rollout.
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

from tspo_jax import config as config_module
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_agent, load_answerer, load_clip
from tspo_jax.command_line import entry_point
from tspo_jax.config import MAY_DIFFER, Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.loader import Loader, LoaderConfig
from tspo_jax.data.needle import NeedleConfig
from tspo_jax.data.questions import read_questions
from tspo_jax.devices import processes, sharding
from tspo_jax.pages import report
from tspo_jax.runs import estimate
from tspo_jax.runs.metrics import DeviceClock, Stopwatch
from tspo_jax.runs.preemption import EXIT_STATUS, Preemption
from tspo_jax.runs.run_folder import Checkpoints, TrainState, check_run, in_use, write_run_config
from tspo_jax.runs.training_log import NotFiniteError, TrainingLog
from tspo_jax.tspo import environment, programs
from tspo_jax.tspo.actor import Actor, Drawn
from tspo_jax.tspo.environment import Environment
from tspo_jax.tspo.held_out import MAIN, HeldOut

LOSS_NOTE = (
    "The loss is 0 by construction: rewards count relative to their group's mean, so only its gradient says something. "
    "Watch the rewards rise; groups whose rewards are all equal (dead) teach nothing."
)


def train(config: Config, run_dir: Path, devices: Sequence[jax.Device] | None = None) -> bool:
    """Trains until `config.num_steps` updates are done, from the newest checkpoint of `run_dir` if it has one.

    Runs on `devices`, by default on all that there are. Returns False where SIGTERM stopped it before; then the last
    step is saved.
    """
    mesh = sharding.make_mesh(config.mesh.axes, devices or jax.devices())
    sharding.check_batch_size(mesh, config.batch_size)
    check_run(run_dir, dataclasses.asdict(config), MAY_DIFFER)

    # What is trained.
    graphdef, agent = load_agent(
        config.agent.init or config.agent.clip,
        window=config.agent.window,
        num_heads=config.agent.num_heads,
        seed=config.seed,
        kind=config.agent.kind,
    )
    state = TrainState(agent, jax.jit(programs.make_optimizer(config).init)(agent))
    state = sharding.put_replicated(mesh, state._replace(drew=agent if config.policy.stale_steps else None))
    initial = sharding.put_replicated(mesh, agent) if config.policy.kl or config.policy.kl_limit else None
    sample = programs.make_sample(graphdef, config, mesh)
    update = programs.make_update(graphdef, config, mesh)
    warm_start = programs.make_warm_start(graphdef, config, mesh)

    # What is frozen: the answerer, and the questions as CLIP and the answerer read them.
    questions, bad_lines = read_questions(config.data.questions, strict=config.data.strict)
    if config.policy.warm_start_steps and not any(q.evidence or q.kind == "specific" for q in questions):
        raise ValueError(
            f"config.policy.warm_start_steps is {config.policy.warm_start_steps}, but {config.data.questions} has "
            "nothing to learn from: neither evidence nor specific questions"
        )
    clip = load_clip(config.agent.clip)
    check_width(agent, clip.width, config.agent.init)
    store = FrameStore(config.data.store, clip.identity)
    per_question = {"text": clip.text_features([question.query for question in questions])}
    held_out = None
    if config.held_out.every:
        held_out = HeldOut(config, run_dir, clip, graphdef, agent, mesh, report.write_page)
    del clip  # its weights leave the device
    where = sharding.answerer_sharding(
        mesh, weights.read_config(config.answerer.folder), split_over_data=config.mesh.split_over_data
    )
    a = config.answerer
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video)
    environment.check_frame_sizes(store, answerer)
    per_question |= environment.arrays_per_question(config, questions, answerer)

    with ExitStack() as stack:
        loader = Loader(store, questions, loader_config(config), config.seed, per_question, *sharding.data_slice(mesh))
        stack.enter_context(loader)
        if jax.process_index() == 0:
            stack.enter_context(in_use(run_dir))
            write_run_config(run_dir, dataclasses.asdict(config))
        checkpoints = stack.enter_context(Checkpoints(run_dir, config.keep_checkpoints))
        start = checkpoints.latest_step()
        if start:
            state, iterator = checkpoints.restore(start, like=state)
            loader.set_state(iterator)
        clock = stack.enter_context(DeviceClock())
        log = stack.enter_context(TrainingLog(run_dir, config, start, clock))
        for line in bad_lines:
            log.note(f"left out: {line}")
        if start >= config.num_steps:
            log.note(f"{run_dir}: all {config.num_steps} steps are done")
            return True
        log.note(f"{run_dir}: resuming after step {start}" if start else LOSS_NOTE)
        pool = stack.enter_context(ThreadPoolExecutor(config.data.decode_threads))
        world = Environment(config, mesh, questions, store, loader.names, answerer, pool, clock)
        actor = Actor(config, mesh, sample, world, loader, clock)
        preemption = stack.enter_context(Preemption())
        profiled = range(start + 2, start + 2 + config.profile_steps)
        profile = stack.enter_context(ExitStack())
        stack.enter_context(processes.end_together(agreed=NotFiniteError))
        if config.policy.warm_start_steps < config.num_steps:
            log.note("compiling the programs of a step; for large models that takes minutes")
            log.expect(estimate.of_run(config, mesh, world, loader.examples(), sample, update, state, initial))

        def begin(step: int, agent: dict) -> Drawn:
            loaded = actor.load(watch)
            log.finish_row()  # of the last step, whose update has had the time of loading to run
            return actor.draw(step, agent, loaded, watch)

        def finish_step() -> bool:
            """Whether the run must stop after this step."""
            done = step + 1
            log.start_row(done, rows, metrics, watch)
            if profiled and step == profiled[-1]:
                profile.close()
            is_last, must_stop = done == config.num_steps, preemption.must_stop(done)
            is_evaluated = held_out and not must_stop and (is_last or done % config.held_out.every == 0)
            if must_stop or is_last or is_evaluated or done % config.checkpoint_every == 0:
                log.finish_row()
                accuracy = {}
                if is_evaluated:
                    accuracy = held_out.measure(done, state.agent, answerer, world.rollout)
                    log.add(done, accuracy)
                place = ahead.loaded.place if ahead else loader.get_state()
                checkpoints.save(done, state, place, accuracy.get(MAIN))
            return must_stop and not is_last

        ahead = None  # with stale_steps, the next step's picks
        for step in range(start, config.num_steps):
            if profiled and step == profiled[0]:
                profile.enter_context(jax.profiler.trace(str(run_dir / "profile")))
            watch = Stopwatch()
            if step < config.policy.warm_start_steps:
                _, rows, batch = actor.load(watch)
                log.finish_row()
                with watch("update"):
                    labels = sharding.put_batch(mesh, world.labels(rows))
                    state, metrics = warm_start(state, batch, labels, np.int32(step))
            else:
                drew = state.agent if state.drew is None else state.drew
                now = ahead or begin(step, drew)
                _, rows, batch = now.loaded
                is_ahead = config.policy.stale_steps and step + 1 < config.num_steps
                ahead = begin(step + 1, state.agent) if is_ahead else None
                answers = world.ask(now.shown, watch)
                if ahead:
                    ahead = ahead._replace(shown=list(ahead.shown))  # fetched while the MLLM answers
                draws, measured = actor.measure(step, drew, now, answers, watch)
                with watch("update"):
                    state, metrics = update(state, batch, draws, measured, np.int32(step), initial)
            clock.started(metrics["tau"])
            if finish_step():
                break
        else:
            return True
        log.note(f"{run_dir}: stopped by SIGTERM, saved after step {step + 1}; run the same command to go on")
        return False


def loader_config(config: Config) -> LoaderConfig:
    data, specific = config.data, config.data.specific
    shares = {"general": data.general.share, "specific": specific.share}
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
        mixture={kind: share for kind, share in shares.items() if share} or None,
        num_workers=data.workers,
    )


def check_width(agent: dict, width: int, folder: str) -> None:
    found = agent["mlp"]["linear_1"]["bias"].shape[0]
    if found != width:
        raise ValueError(
            f"agent.init={folder}: an agent of width {found}, but agent.clip gives features of width {width}"
        )


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_string("run_dir", "", "Folder of the run; default: runs/<name of the config file>.")


def main() -> int:
    config = config_module.from_flags()
    processes.join(config.distributed)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    with processes.end_together():
        is_done = train(config, Path(flags.FLAGS.run_dir or f"runs/{name}"))
    return 0 if is_done else EXIT_STATUS


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=config_module.check_overrides)
