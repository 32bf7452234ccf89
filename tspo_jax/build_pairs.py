"""Makes pairs of answers for train_answerer: a question answered with the evidence's frames and without them.

    python -m tspo_jax.build_pairs --config=configs/tpo_llava_video_7b.py [--config.build.answer_style=letter ...]

From questions with known answers (config.build.questions: a TSPO-10K file, or one of LLaVA-Video-178K's *_mc_*.json)
whose videos are in the store (predecode). Recipes: irrelevant (frames without the evidence) and incomplete (few of its
frames). Or, for videos without questions, config.build.writer names a language model (module:function or an
OpenAI-compatible address) that writes them from our answerer's captions and judges the answers.

The stages' files, the pairs and a card with counts go to config.build.output (tpo/building.py and tpo/writing.py say
what they are); run again after a kill, it goes on where it stopped. Result on stdout: {"counts", "yield" (share of the
questions that gave a pair, by recipe), "sha256", "model", "left_out"}.
"""

from collections.abc import Callable
from functools import partial

import jax
from absl import flags
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from tspo_jax import config as config_module
from tspo_jax.command_line import entry_point
from tspo_jax.command_line.progress_bar import ProgressBar
from tspo_jax.tpo import building
from tspo_jax.tpo.config import TpoConfig


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_string("output", "", "File for the result; default: stdout.")


def main() -> int:
    config = config_module.from_flags(TpoConfig)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with ProgressBar(*columns) as progress:

        def watch(stage: str, total: int, done: int) -> Callable[[int], None]:
            task = progress.add_task(stage, total=total, completed=done)
            return lambda count: progress.advance(task, count)

        result = building.run(config, jax.devices(), watch)
    for message in result["left_out"][:20]:
        progress.console.print(f"left out: {message}", markup=False, soft_wrap=True)
    entry_point.write_result(result, flags.FLAGS.output)
    return 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=partial(config_module.check_overrides, kind=TpoConfig))
