"""Trains the temporal agent by TSPO with a frozen Video-MLLM.

    python -m tspo_jax.train --config=configs/toy.py [--config.optimizer.learning_rate=1e-4 ...] [--run_dir=runs/toy]

A step, with B questions, T candidate frames, G draws of K frames each:

    batch    data/loader.py         question rows -> features [B,T,D], mask, text feature [B,D], prompt, answer, needles
    sample   tspo/programs.py       agent scores every frame; G draws of K frames without replacement -> [B,G,K]
    fetch    data/                  only the drawn frames are read and decoded, each once -> uint8 [B,U,S,S,3]
    answer   answering/rollout.py   the frozen MLLM answers all B*G prompts as one batch -> tokens [B,G,new]
    reward   tspo/rewards.py        answers and draws -> [B,G]
    update   tspo/programs.py       rewards relative to their group's mean -> one optimiser step on the agent

sample, answer and update are compiled before the first step, once per kind of sample and bucket of T; nothing else
runs on the device. The next batch is loaded meanwhile, metrics are read from the device one step late, and frames are
fetched while other questions are answered (answerer.question_chunk). With policy.stale_steps=1 the next picks are drawn
before the update and fetched while the MLLM answers; the update then corrects for the agent that drew.

Running the same command again resumes from the newest checkpoint, exactly (runs/loop.py): randomness is a function of
(seed, step, question index), and the place of the data iterator is part of the checkpoint. After SIGTERM the step in
progress is finished and saved, and the exit status is 75; where another process of the run ended, it is 76. `python -m
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
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax import config as config_module
from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.folders import load_agent, load_answerer, load_clip
from tspo_jax.command_line import entry_point
from tspo_jax.config import MAY_DIFFER, Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.loader import Batch, Loader, LoaderConfig
from tspo_jax.data.needle import NeedleConfig
from tspo_jax.data.questions import questions_sha256, read_questions
from tspo_jax.devices import sharding
from tspo_jax.evaluation.run import parameters_sha256
from tspo_jax.pages import report
from tspo_jax.runs.loop import Evaluated, Loop, define_flags, run_from_flags
from tspo_jax.runs.run_folder import check_run
from tspo_jax.tspo import actor, environment, programs, step_cost, step_metrics
from tspo_jax.tspo.actor import Actor
from tspo_jax.tspo.environment import Environment, Fetching
from tspo_jax.tspo.held_out import MAIN, HeldOut
from tspo_jax.tspo.programs import TrainState

# Fields of the config that name files: what they hold may not change in a run, where they lie may.
CONTENT = ("data.questions", "data.store", "agent.clip", "agent.init", "answerer.folder", "answerer.adapter")
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
    check_run(run_dir, dataclasses.asdict(config), (*MAY_DIFFER, *CONTENT))
    if config.agent.kind == "span" and not config.policy.warm_start_steps:
        raise ValueError(
            "config.agent.kind is span, but config.policy.warm_start_steps is 0: only labels teach an agent where the "
            "evidence begins and ends; let all or the first of config.num_steps learn from them"
        )

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
    questions, bad_lines = read_questions(config.data.questions, strict=config.data.strict, max_bad=config.data.max_bad)
    if config.policy.warm_start_steps and not any(q.evidence or q.kind == "specific" for q in questions):
        raise ValueError(
            f"config.policy.warm_start_steps is {config.policy.warm_start_steps}, but {config.data.questions} has "
            "nothing to learn from: neither evidence nor specific questions"
        )
    clip = load_clip(config.agent.clip, config.agent.clip_dtype)
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
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video, a.adapter)
    budgets = (config.data.general.k, config.data.specific.k)
    environment.check_frame_sizes(store, answerer, budgets, {question.video for question in questions})
    kept, too_long = environment.within_context(config, questions, store, answerer)
    questions = [dataclasses.replace(questions[place], index=index) for index, place in enumerate(kept)]
    per_question = {name: rows[kept] for name, rows in per_question.items()}
    per_question |= environment.arrays_per_question(config, questions, answerer)

    content = {
        "data.questions": questions_sha256(questions),
        "data.store": store.features_sha256({question.video for question in questions}),
        "agent.clip": store.clip_identity,
        "agent.init": parameters_sha256(agent),
        "answerer.folder": weights.checkpoint_identity(a.folder),
    }
    if a.adapter:
        content["answerer.adapter"] = adapters.folder_identity(a.adapter)

    def shape_of(step: int, rows: Batch) -> tuple[str, int] | None:
        return None if step < config.policy.warm_start_steps else step_cost.shape_of(rows)

    with ExitStack() as stack:
        loader = Loader(store, questions, loader_config(config), config.seed, per_question, *sharding.data_slice(mesh))
        stack.enter_context(loader)
        put, columns = partial(actor.put, mesh), step_metrics.COLUMNS
        loop = Loop(
            run_dir,
            config,
            loader,
            put=put,
            shape_of=shape_of,
            may_differ=MAY_DIFFER,
            content=content,
            setting=held_out.setting if held_out else "",
            columns=columns,
        )
        stack.enter_context(loop)
        for line in (*bad_lines, *too_long):
            loop.note(f"left out: {line}")
        state = loop.restore(state)
        if loop.is_done:
            return True
        if not loop.start:
            loop.note(LOSS_NOTE)
            for line in (*loader.repeated, *(held_out.shared_with(questions) if held_out else ())):
                loop.note(f"note: {line}")
        pool = stack.enter_context(ThreadPoolExecutor(config.data.decode_threads))
        world = Environment(config, mesh, questions, store, loader.names, answerer, pool, loop.clock)
        acting = Actor(config, mesh, sample, world, loop.clock)
        if config.policy.warm_start_steps < config.num_steps:
            for kind in sorted({question.kind for question in questions}):
                for line in world.long_prompts(kind, loader_config(config).picks[kind]):
                    loop.note(f"note: {line}")
            loop.note("compiling the programs of a step; for large models that takes minutes")
            loop.expect(step_cost.of_run(config, mesh, world, loader.examples(), sample, update, state, initial))

        ahead = None  # with stale_steps, the next step's picks

        def learn_from_labels(step: int, state: TrainState) -> tuple[TrainState, dict]:
            rows, batch = loop.batch(step)
            with loop.watch("update"):
                labels = sharding.put_batch(mesh, world.labels(rows))
                return warm_start(state, batch, labels, np.int32(step))

        def learn_from_rewards(step: int, state: TrainState) -> tuple[TrainState, dict]:
            nonlocal ahead
            watch, drew = loop.watch, state.agent if state.drew is None else state.drew
            now = ahead or acting.draw(step, drew, loop.batch(step), watch)
            rows, batch = now.loaded
            is_ahead = config.policy.stale_steps and step + 1 < config.num_steps
            ahead = acting.draw(step + 1, state.agent, loop.batch(step + 1), watch) if is_ahead else None
            if ahead:
                ahead = ahead._replace(shown=Fetching(ahead.shown))  # while the MLLM answers
            answers = world.ask(now.shown, watch)
            draws, measured = acting.measure(step, drew, now, answers, watch)
            with watch("update"):
                state, metrics = update(state, batch, draws, measured, np.int32(step), initial)
            return state, step_metrics.of_kind(rows["kind"], metrics)

        def step(number: int, state: TrainState) -> tuple[TrainState, dict]:
            learn = learn_from_labels if number < config.policy.warm_start_steps else learn_from_rewards
            return learn(number, state)

        def evaluate(done: int, state: TrainState) -> Evaluated:
            accuracy = held_out.measure(done, state.agent, answerer, world.rollout)
            return step_metrics.held_out(done, accuracy, MAIN)

        return loop.run(state, step, evaluate, config.held_out.every)


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


def main() -> int:
    return run_from_flags(Config, train)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=config_module.check_overrides)
