"""A server of real videos for the tests of its routes and of its page."""

import shutil
import threading

import pytest
import tiny_store
from video_files import write_video

from tspo_jax.pages.library import Library
from tspo_jax.pages.server import Server
from tspo_jax.selection import scoring


@pytest.fixture(scope="module")
def server(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "videos").mkdir()
    (folder / "secret.mp4").write_bytes(b"not for the page")
    (folder / "videos" / "link.mp4").symlink_to(folder / "secret.mp4")
    shutil.copy(golden / "tspo_agent.mp4", folder / "videos" / "long.mp4")
    write_video(folder / "videos" / "short.mp4", num_frames=125)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    tiny_store.store_videos(
        folder / "store", {"sub/stored.mp4": folder / "videos" / "short.mp4"}, golden / "tspo_agent"
    )
    library = Library(
        folder / "videos",
        folder / "store",
        scoring.load_scorer(golden / "tspo_agent"),
        lambda frames, question, _times: f"{len(frames)} frames <b> {question[:3]}",
    )
    with Server(("127.0.0.1", 0), library, max_upload=200_000) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
