"""Speed of pre-decoding, of fetching picked frames, of the store's layouts and of the loader, on the CPU.

    python -m benchmarks.data_pipeline [decode long fetch layout loader memory]

decode   a minute of 720p H.264 by predecode's workers against the plain decoder (FFmpeg, every picture, nothing done
         with it) on one core, in source frames per second (to reach: 90 % with one worker, nearly twice that with two).
long     memory that decoding 10 minutes and 10 hours takes a worker (to reach: the same).
fetch    128 frames of 384 px of a 10-minute and of a 10-hour video, against the JPEG decoder alone, which has the files
         in memory and leaves the pictures in one new array too (to reach: 110 %); the same with the resizing of
         training. CPU time of one thread.
layout   why the store is what it is: one file per video or for all, records per chunk, compression. CPU time.
loader   batches of 4 needle samples, T = 800, D = 768 (to reach: 20 times what training takes. A step of 16 questions
         with 8 sets of 16 frames makes a 7B answerer prefill 128 prompts of 3,600 tokens, 7e15 operations: at 40 % of
         its peak a v5p-32 needs 2.4 s. Each of its 4 hosts then loads 4 questions per step: 8 batches per second).
memory   of the loader over 10,000 small batches (to reach: flat).
"""

import concurrent.futures
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from tspo_jax.data import frame_store
from tspo_jax.data.decode_workers import Job, Limits, decode_video, run_jobs
from tspo_jax.data.loader import Loader, LoaderConfig, fetch_frames
from tspo_jax.data.needle import NeedleConfig
from tspo_jax.data.questions import Question
from tspo_jax.models.preprocessing import ImageProcessor


def noisy_picture(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with the detail of a photograph: the store's JPEG takes 59 kB for 384 x 682."""
    rng = np.random.default_rng(seed)
    coarse = [rng.integers(0, 255, (height // s + 1, width // s + 1, 3), np.uint8) for s in (80, 16, 6)]
    large = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC), float) for c in coarse]
    return (0.6 * large[0] + 0.3 * large[1] + 0.1 * large[2]).astype(np.uint8)


def best(*runs: Callable[[], object], clock=time.perf_counter, repeats: int = 4) -> list[float]:
    """Fastest of a few repeats of each, in turns of random order: what ran before decides what memory one gets."""
    times, rng = [[] for _ in runs], np.random.default_rng(0)
    for _ in range(repeats):
        for i in rng.permutation(len(runs)):
            start = clock()
            runs[i]()
            times[i].append(clock() - start)
    return [min(taken) for taken in times]


def decode(folder: Path) -> dict:
    frame_store.open_settings(folder / "s", frame_store.StoreSettings())
    kinds = {"with B pictures": {}, "without": {"tune": "zerolatency"}}
    return {name: decode_file(folder, folder / f"{i}.mp4", kinds[name]) for i, name in enumerate(kinds)}


def decode_file(folder: Path, path: Path, options: dict[str, str]) -> dict:
    num_frames = 1800
    write_720p(path, num_frames, options)

    def plain():
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            assert sum(1 for _ in container.decode(video=0)) == num_frames

    def job(i: int = 0) -> Job:
        return Job(str(path), f"{path.stem}/{i}", 1, str(folder / "s"), frame_store.StoreSettings(), ("pyav",))

    def workers_rate(workers: int) -> float:
        outcomes = run_jobs([job(i) for i in range(4 * workers)], workers, Limits())
        for _ in range(workers):  # the processes start
            next(outcomes)
        start = time.perf_counter()
        return sum(1 for _ in outcomes) * num_frames / (time.perf_counter() - start)

    alone, ours = best(plain, lambda: decode_video(job(), lambda share: None), clock=time.process_time)
    result = {"CPU time": f"{num_frames / ours:.0f} frames/s, {alone / ours:.0%} of the plain decoder"}
    for workers in (1, 2):
        rate, (alone,) = workers_rate(workers), best(plain)  # in turns, for other programs disturb both
        rate = max(rate, workers_rate(workers))
        result[f"{workers} worker(s)"] = f"{rate:.0f} frames/s, {rate * alone / num_frames:.0%} of the plain decoder"
    return result


def write_720p(path: Path, num_frames: int, options: dict[str, str]) -> None:
    write_video(path, num_frames, (1280, 720), {"preset": "veryfast", "crf": "23"} | options)


def write_video(path: Path, num_frames: int, size: tuple[int, int], options: dict[str, str]) -> None:
    """A view that moves over a large picture."""
    width, height = size
    picture = noisy_picture(height + 180, width + 320, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            x, y = i // 2 % 300, i // 3 % 150
            shown = np.ascontiguousarray(picture[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())


def long(folder: Path) -> dict:
    frame_store.open_settings(folder / "s", frame_store.StoreSettings())
    write_video(folder / "minute.mp4", 1800, (320, 180), {"preset": "veryfast"})
    result = {}
    for container in ("mp4", "mkv"):
        megabytes = {}
        for minutes in (10, 600):
            name = f"{minutes}.{container}"
            repeat_video(folder / "minute.mp4", folder / name, minutes)
            job = Job(str(folder / name), name, 1, str(folder / "s"), frame_store.StoreSettings(), ("pyav",))
            (outcome,) = run_jobs([job], 1, Limits(stall_seconds=600), work=decode_and_tell_memory)
            megabytes[minutes] = outcome.num_frames / 1000
        per_picture = 1e6 * (megabytes[600] - megabytes[10]) / (590 * 1800)
        result[container] = (
            f"10 minutes {megabytes[10]:.0f} MB, 10 hours {megabytes[600]:.0f} MB: {per_picture:.0f} bytes per picture"
        )
    return result


def repeat_video(path: Path, target: Path, times: int) -> None:
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [(p, p.pts, p.dts, p.time_base, p.duration) for p in source.demux(video=0) if p.size]
        length = sum(duration for *_, duration in packets)
        for i in range(times):
            for packet, pts, dts, time_base, duration in packets:
                packet.stream, packet.time_base, packet.duration = stream, time_base, duration
                packet.pts, packet.dts = pts + i * length, dts + i * length
                container.mux(packet)


def decode_and_tell_memory(job: Job, progress: Callable[[float], None]) -> int:
    """Work for run_jobs; returns how much memory the process had at most, over what it starts with, in kB."""

    def kilobytes(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(field)[1].split()[0])

    start = kilobytes("VmRSS:")
    decode_video(job, progress)
    return kilobytes("VmHWM:") - start


def fetch(folder: Path) -> dict:
    jpegs = [frame_store.encode_jpeg(noisy_picture(384, 682, i), 95) for i in range(64)]
    frame_store.open_settings(folder, frame_store.StoreSettings())
    result = {"kB per frame": round(np.mean([len(j) for j in jpegs]) / 1e3)}
    for name, num_frames in (("10 minutes", 600), ("10 hours", 36_000)):
        result[name] = fetch_from(folder, name, num_frames, jpegs)
    return result


def fetch_from(folder: Path, name: str, num_frames: int, jpegs: list[bytes]) -> dict:
    times = np.arange(num_frames, dtype=float)
    entry = frame_store.VideoEntry(name, 30.0, 30 * num_frames, times, times.astype(int) * 30, 682, 384, "", 1, "")
    frame_store.write_frames(folder, entry, (jpegs[i % 64] for i in range(num_frames)))
    picks = np.sort(np.random.default_rng(0).choice(num_frames, 128, replace=False))
    store, video = frame_store.FrameStore(folder), np.zeros((1, 128), int)

    resize = ImageProcessor.siglip(384).crop

    def decoder_alone() -> np.ndarray:
        frames = np.empty((128, 384, 682, 3), np.uint8)  # a fetch leaves one new array too
        for place, i in zip(frames, picks, strict=True):
            simplejpeg.decode_jpeg(jpegs[i % 64], buffer=place)
        return frames

    def decoder_and_resizing_alone() -> np.ndarray:
        frames = np.empty((128, 384, 384, 3), np.uint8)
        for place, i in zip(frames, picks, strict=True):
            place[:] = resize(simplejpeg.decode_jpeg(jpegs[i % 64]))
        return frames

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        decoding, frames, opened, resizing, training = best(
            decoder_alone,
            lambda: store.frames(name, picks, pool),
            lambda: frame_store.FrameStore(folder).frames(name, picks, pool),
            decoder_and_resizing_alone,
            lambda: fetch_frames(store, [name], video, picks[None], resize, pool),
            clock=time.process_time,  # not disturbed by other programs
            repeats=20,
        )
    return {
        "frames": f"{frames * 1e3:.0f} ms, JPEG decoder alone {decoding * 1e3:.0f} ms: {frames / decoding:.1%}",
        "and the file opened first": f"{opened / decoding:.1%}",
        "resized to 384 x 384": f"{training * 1e3:.0f} ms, alone {resizing * 1e3:.0f} ms: {training / resizing:.1%}",
    }


def layout(folder: Path) -> dict:
    options = ("group_size:1,uncompressed", "group_size:1", "group_size:16,uncompressed")
    jpegs = [frame_store.encode_jpeg(noisy_picture(384, 682, i), 95) for i in range(16)]
    result = {}
    for option in options:
        for name, per_file in (("a file per video", 120), ("one file", 24_000)):
            files = folder / f"{option} {per_file}"
            files.mkdir()
            seconds = read_anywhere(files, option, per_file, jpegs)
            result[f"{option}, {name}"] = f"{seconds * 1e3:.1f} ms to open the files and read 128 frames"
    return result


def read_anywhere(folder: Path, option: str, per_file: int, jpegs: list[bytes]) -> float:
    """CPU seconds for 128 random frames out of 24,000."""
    for i in range(24_000 // per_file):
        writer = ArrayRecordWriter(str(folder / str(i)), option)
        for j in range(per_file):
            writer.write(jpegs[j % 16])
        writer.close()
    picks = np.random.default_rng(0).choice(24_000, 128, replace=False).tolist()

    def read():
        readers = {}
        for pick in picks:
            path = str(folder / str(pick // per_file))
            if path not in readers:
                readers[path] = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
            readers[path].read(pick % per_file, pick % per_file + 1)

    return best(read, clock=time.process_time)[0]


def loader(folder: Path) -> dict:
    config = LoaderConfig(batch_size=4, picks={"specific": 16}, buckets=(800,))
    with Loader(*feature_store(folder, width=768), config, seed=0) as batches:
        for _ in range(20):
            next(batches)
        start = time.perf_counter()
        for _ in range(500):
            next(batches)
        return {"batches per second": round(500 / (time.perf_counter() - start), 1)}


def memory(folder: Path) -> dict:
    few = NeedleConfig(group_frames=4)
    config = LoaderConfig(batch_size=4, picks={"specific": 16}, buckets=(64,), needle=few)
    result = {}
    with Loader(*feature_store(folder, width=16), config, seed=0) as batches:
        for number in range(1, 10_001):
            next(batches)
            if number in (100, 5_000, 10_000):
                result[f"MB after {number} batches"] = resident_mb()
    return result


def feature_store(folder: Path, width: int) -> tuple[frame_store.FrameStore, list[Question]]:
    """64 videos of 150 frames with features [150, width] and without pictures, and a needle question about each."""
    frame_store.open_settings(folder, frame_store.StoreSettings())
    clip, rng, questions = "0" * 16, np.random.default_rng(0), []
    for i in range(64):
        entry = frame_store.VideoEntry(f"{i}", 1.0, 150, np.arange(150.0), np.arange(150), 8, 8, "", 1, "")
        entry = frame_store.write_frames(folder, entry, [b"jpeg"] * 150)
        frame_store.write_features(folder, entry, clip, [rng.standard_normal((150, width), np.float32)], width)
        questions.append(Question(i, f"{i}", "q", "q", ("x", "y"), "A", "specific", f"q:{i}"))
    return frame_store.FrameStore(folder, clip), questions


def resident_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def main(names: list[str]) -> None:
    benchmarks = {benchmark.__name__: benchmark for benchmark in (decode, long, fetch, layout, loader, memory)}
    if not benchmarks.keys() >= set(names):
        sys.exit(__doc__)
    for name in names or benchmarks:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: benchmarks[name](Path(folder))}, indent=1), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
