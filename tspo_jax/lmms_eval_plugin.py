"""Chosen frames for any video model of lmms-eval, without a fork of it.

    lmms-eval --model=tspo --model_args=model=llava_vid,frame_idx=TSPO_LongVideoBench_frameIdx.json,\
        benchmark=longvideobench,pretrained=lmms-lab/LLaVA-Video-7B-Qwen2,max_frames_num=64 --tasks=longvideobench_val_v
    lmms-eval --model=tspo_chat --model_args=model=qwen2_5_vl,agent=TSPO-0.4B,num_frames=64,max_num_frames=64 ...

Installing tspo_jax registers both models by the entry point `lmms_eval.models`: `tspo` wraps models of lmms-eval's
simple interface, `tspo_chat` those of its chat interface. Arguments other than those below go to the wrapped model.

The wrapped model still samples its video itself, so it is given another video: only the chosen frames, one per second,
H.264 without loss. A model that takes at least as many frames (max_frames_num, max_num_frames) takes all of them; that
of Qwen2.5-VL reads an even number of at least four, so choose such a number.
"""

import atexit
import copy
import functools
import hashlib
import shutil
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.models.registry_v2 import ModelManifest

from tspo_jax.data.decode import Video
from tspo_jax.data.video_files import VIDEO_SUFFIXES
from tspo_jax.evaluation import benchmarks, frame_indices
from tspo_jax.selection import methods
from tspo_jax.selection.choosing import query, select_frames


def manifests() -> list[ModelManifest]:
    """What the entry point registers."""
    return [
        ModelManifest("tspo", simple_class_path=f"{__name__}.ChosenFrames"),
        ModelManifest("tspo_chat", chat_class_path=f"{__name__}.ChosenFramesChat"),
    ]


class ChosenFrames(lmms):
    """A model of lmms-eval that sees the frames of an index file, or those that an agent chooses.

    Args:
      model: name of the wrapped model.
      frame_idx, benchmark: index file (either form of evaluation/frame_indices.py) and the benchmark whose question ids
        it has; or
      agent, num_frames, method, window: as in select_frames; or
      method=tstar with detector, and targets and cues (names with ; between) or an answerer that names them (a
        folder for this project; answerer_adapter: PEFT folder of adapters for it).
      adapter: PEFT folder of adapters for the wrapped model (python -m tspo_jax.export writes one); needs peft.
      wrapped: arguments of the wrapped model.

    Raises: ValueError for arguments that do not fit, and for questions that the index file does not have.
    """

    is_simple = True

    def __init__(
        self,
        model: str,
        frame_idx: str = "",
        benchmark: str = "",
        agent: str = "",
        num_frames: int = 64,
        method: str = "topk",
        window: int | None = None,
        detector: str = "",
        targets: str = "",
        cues: str = "",
        answerer: str = "",
        answerer_adapter: str = "",
        adapter: str = "",
        **wrapped,
    ):
        searches = method == methods.SEARCH
        if bool(frame_idx) + bool(agent) + searches != 1:
            raise ValueError(
                "model_args: give either frame_idx (an index file) or agent (a folder) or method=tstar with a detector"
            )
        if searches and not (detector and (targets or answerer)):
            raise ValueError("model_args: method=tstar needs a detector, and targets or an answerer that names them")
        if answerer_adapter and not answerer:
            raise ValueError("model_args: answerer_adapter needs the answerer that it is for")
        if frame_idx and not benchmark:
            raise ValueError("model_args: frame_idx needs benchmark, whose ids its questions have")
        cls = get_model(model, force_simple=self.is_simple)
        if cls.is_simple != self.is_simple:
            other = "tspo" if cls.is_simple else "tspo_chat"
            raise ValueError(f"model_args: {model} has the other interface of lmms-eval; use --model={other}")
        super().__init__()
        if frame_idx:
            self._choose = _of_index_file(frame_idx, benchmark)
        elif searches:
            named_by = answerer, answerer_adapter
            self._choose = _of_search(detector, targets.split(";"), cues.split(";"), named_by, num_frames)
        else:
            self._choose = _of_agent(agent, num_frames, method, window)
        self.model = cls(**wrapped)
        if adapter:
            put_adapter(self.model, adapter)
        self.model.task_dict = self.task_dict
        self._folder = Path(tempfile.mkdtemp(prefix="tspo_frames_"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)

    def generate_until(self, requests) -> list[str]:
        return self.model.generate_until([self._replaced(request) for request in requests])

    def generate_until_multi_round(self, requests) -> list[str]:
        return self.model.generate_until_multi_round([self._replaced(request) for request in requests])

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        return self.model.loglikelihood([self._replaced(request) for request in requests])

    def set_cache_hook(self, cache_hook) -> None:
        self.model.set_cache_hook(cache_hook)

    def clean(self) -> None:
        self.model.clean()

    def __getattr__(self, name):
        """What else the evaluator asks a model for: device, tokenizer, accelerator .."""
        if name == "model":  # not there yet
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def rank(self) -> int:
        return self.model.rank

    @property
    def world_size(self) -> int:
        return self.model.world_size

    def _replaced(self, request):
        """The request, its function document -> visuals (or messages) giving the video of the chosen frames."""
        arguments = list(request.args)
        place = next(i for i in (2, 1) if callable(arguments[i]))  # chat: 1, simple: 2 (behind doc_to_target or not)
        to_visuals = arguments[place]
        arguments[place] = lambda document, *args, **kwargs: self._with_clips(
            to_visuals(document, *args, **kwargs), document
        )
        replaced = copy.copy(request)
        replaced.arguments = tuple(arguments)
        return replaced

    def _with_clips(self, visuals, document: dict):
        """Video paths anywhere in `visuals` (lists and dicts of them) replaced by the video of the chosen frames."""
        if isinstance(visuals, str) and visuals.lower().endswith(VIDEO_SUFFIXES):
            return str(self._clip(visuals, document))
        if isinstance(visuals, list | tuple):
            return [self._with_clips(visual, document) for visual in visuals]
        if isinstance(visuals, dict) and visuals.get("type") != "text":
            return {key: self._with_clips(value, document) for key, value in visuals.items()}
        return visuals

    def _clip(self, path: str, document: dict) -> Path:
        video = Video(path)
        frames = self._choose(video, document)
        name = hashlib.sha256(f"{path} {frames}".encode()).hexdigest()[:24]
        clip = self._folder / f"{name}.mp4"
        if not clip.is_file():
            write_clip(video, frames, clip)
        return clip


def put_adapter(model: lmms, adapter: str) -> None:
    """Puts the adapters of a PEFT folder on the torch model inside a model of lmms-eval, in place.

    Raises ValueError without peft, for a model without a torch model, and for adapters of another model.
    """
    network = getattr(model, "_model", None)
    if network is None:
        raise ValueError(f"model_args: adapter: {type(model).__name__} holds no torch model to put adapters on")
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("model_args: adapter needs the package peft: pip install peft") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay without effect
        try:
            PeftModel.from_pretrained(network, adapter)
        except (UserWarning, RuntimeError) as error:
            raise ValueError(f"{adapter}: does not fit {type(network).__name__}: {error}") from None


class ChosenFramesChat(ChosenFrames):
    """The same for models of the chat interface."""

    is_simple = False


def _of_index_file(path: str, benchmark: str):
    """(video, document) -> frame numbers, by the document's id."""
    fields = benchmarks.lookup(benchmark).id_fields
    rows = {}
    for row in frame_indices.question_rows(path):
        has_id = all(field in row for field in fields)
        question = "".join(str(row[field]) for field in fields) if has_id else str(row["question_id"])
        if question in rows:
            raise benchmarks.BenchmarkError(
                f"{row.where}: question {question} has a second selection; take those of one method and budget with "
                "python -m tspo_jax.convert_indices --method=NAME --num_frames=K"
            )
        rows[question] = row

    def choose(video: Video, document: dict) -> list[int]:
        question = "".join(str(document[field]) for field in fields)
        if question not in rows:
            raise benchmarks.BenchmarkError(f"{path}: no row for question {question}")
        selection = frame_indices.selection(rows[question], question, video.info.path)
        selection.check_inside(video.num_frames)
        return list(selection.frame_idx)

    return choose


def _of_agent(agent: str, num_frames: int, method: str, window: int | None):
    """(video, document) -> frame numbers that the agent chooses; a video is encoded once for questions in a row."""
    from tspo_jax.selection.scoring import encode_video, load_scorer

    scorer = load_scorer(agent, window)

    @functools.lru_cache(maxsize=4)
    def candidates(path: str):
        return encode_video(Video(path), scorer.clip)

    def choose(video: Video, document: dict) -> list[int]:
        question = query(document["question"])
        return select_frames(scorer, candidates(video.info.path), question, num_frames, method)["frame_idx"]

    return choose


def _of_search(detector: str, targets: list[str], cues: list[str], named_by: tuple[str, str], num_frames: int):
    """(video, document) -> frame numbers that a search finds; only frames that it looks at are decoded."""
    from tspo_jax.answering.grounding import make_searcher
    from tspo_jax.selection.search_options import SearchOptions
    from tspo_jax.selection.searching import search_frames
    from tspo_jax.selection.video_source import file_source

    searcher = make_searcher(detector, SearchOptions(), targets, cues, *named_by)

    def choose(video: Video, document: dict) -> list[int]:
        source = file_source(video.info.path, video.info.path, None)
        return search_frames(searcher, source, document["question"], num_frames)["frame_idx"]

    return choose


def write_clip(video: Video, frames: list[int], path: Path) -> None:
    """A video of these frames alone, one per second: H.264 in RGB without loss, so the pixels are those decoded."""
    pictures = video.frames(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=1, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = video.info.width, video.info.height, "rgb24"
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
