import ast
import dataclasses
import itertools
import json
import random
import re

import pytest

from tspo_jax.answering import agent_prompts
from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import PHASES, Settings, VideoFacts, backtrack, flat, run
from tspo_jax.answering.calls import Calls, CaptionCall, Reply, WriterCall
from tspo_jax.answering.replies import names_ordinal
from tspo_jax.toy.caption_world import Replies, World, agent_of, by_keywords

FORGOTTEN = '{"Confidence": False, "Answer": "No Answer"}'


# ---- the original's trace --------------------------------------------------------------------------------------


def scenarios(golden) -> list[dict]:
    return json.loads((golden / "videolucy_trace.json").read_text())["scenarios"]


def strict_fields(reply: str) -> dict | None:
    """What the original reads in a reply: the dictionary, where nothing about its form is special."""
    try:
        fields = ast.literal_eval(reply)
    except (ValueError, SyntaxError):
        return None
    return fields if isinstance(fields, dict) else None


def first_difference(scenario: dict) -> tuple[int, str]:
    """(number of LLM calls that must be equal, why no more): where a fault of the original that ours does not have
    (docs/rounds.md lists them) begins to matter. Captions behind that call are compared too where the reason says so.
    """
    question, duration = scenario["question"], scenario["video"]["frames"] / scenario["video"]["fps"]
    calls = [event for event in scenario["events"] if event["agent"] not in ("caption", "summary")]
    coarse = next(event for event in scenario["events"] if event["agent"] == "caption")
    windows = [tuple(period) for period, _ in coarse["stored"]]
    refined: dict[tuple, list[str]] = {}
    for number, call in enumerate(calls, start=1):
        fields = strict_fields(call["reply"])
        if fields is None:
            return number, "a reply out of form is asked for again, or read with more patience"
        if call["agent"] in ("coarse_answer", "answer"):
            if not isinstance(fields["Confidence"], bool):
                return number, "a confidence that is a text counts as what it says"
            if fields["Confidence"] and fields["Answer"] in ("No Answer", ""):
                return number, "sure of no answer is not an answer"
            was_ordinal = any("filtering: False" in line for line in scenario["filter_log"])
            if call["agent"] == "coarse_answer" and not fields["Confidence"] and was_ordinal != names_ordinal(question):
                return number, "ordinals are whole words"
        if call["agent"] == "type" and fields["Flag"]:
            periods = [tuple(map(float, period)) for period in fields["Time Period"]]
            if not set(periods) <= set(windows):
                return number, "periods that are no windows mean those that they overlap"
        if call["agent"] == "localize":
            (period, *_) = named = fields["Time Period"]
            if not isinstance(period, tuple | list):
                period = named
            start, end = period = tuple(map(float, period))
            length = end - start
            if not 0 <= start < end <= duration:
                return number, "periods are clamped to the video"
            if length < 10 or 10 < length < 11:
                return number, "the level follows from the length"
            again = refined.get(period, [])
            if len(again) > 1 or fields["Instruction"] in again:
                return number, "a period chosen again without a new instruction is replaced by rule"
            if again and isinstance(named[0], list):
                return number, "captions: periods are equal as numbers, whatever their type"
            if length == 10 and not any(s <= start and end <= e for s, e in refined if e - s > 10):
                return number, "captions: ultra-fine captions stand under whatever contains them"
            inside = any(s <= start and end <= e and (s, e) != period for s, e in windows)
            if length > 10 and period not in windows and (inside or length > 60 or refined):
                return number, "captions: fine captions off the grid stand under whatever contains them"
            refined.setdefault(period, []).append(fields["Instruction"])
    return len(calls), ""


def shown(prompt: str) -> list[list]:
    """The rows of the memory in a prompt, as the golden file has them."""
    rows = []
    for head, start, end, text in re.findall(r"^( *(?:\d+\.|-)) \[([\d.]+) s to ([\d.]+) s\] ?(.*)$", prompt, re.M):
        depth = 0 if head.strip() != "-" else (len(head) - 1) // 2
        level = ("period", "divided", "stamp")[depth]
        rows.append([level, float(start), None if level == "stamp" else float(end), text])
    return rows


def excluded(prompt: str) -> list[list[float]]:
    line = re.search(r"^Looked at before.*$", prompt, re.M)
    return [[float(a), float(b)] for a, b in re.findall(r"\(([\d.]+), ([\d.]+)\)", line[0])] if line else []


def numbers(times, fps: float) -> list:
    frames = [int(t * fps) for t in times]
    return frames if len(frames) <= 3 else [*frames[:2], "...", frames[-1]]


def full_instruction(clip: dict) -> str:
    if clip["instruction"] is None:
        return agent_prompts.COARSE_INSTRUCTION
    return agent_prompts.FINE_INSTRUCTION.format(instruction=clip["instruction"])


def caption_of(scenario: dict, call: CaptionCall) -> str:
    """What the trace's captioner says of a clip: as recorded, or for one that the original did not ask for by its rule
    scene START-END (INSTRUCTION): events."""
    fps = scenario["video"]["fps"]
    for event in scenario["events"]:
        for clip in event.get("clips", []):
            same = numbers(call.times, fps) == clip["frames"] and len(call.times) == clip["num_frames"]
            if same and call.instruction == full_instruction(clip):
                return clip["caption"]
    step = call.times[1] - call.times[0] if len(call.times) > 1 else 1.0
    start, end = call.times[0], call.times[0] + len(call.times) * step
    seen = [text for s, e, longest, text in scenario["world"] if s < end and e > start and end - start <= longest]
    before, after = agent_prompts.FINE_INSTRUCTION.split("{instruction}")
    is_coarse = call.instruction == agent_prompts.COARSE_INSTRUCTION
    instruction = "" if is_coarse else f" ({call.instruction.removeprefix(before).removesuffix(after)})"
    return f"scene {start:g}-{end:g}{instruction}" + (f": {'; '.join(seen)}" if seen else "")


def replay(scenario: dict) -> tuple[list, dict | None]:
    """Our calls with the scenario's replies, as [(caption clips) | (agent, prompt)], until a reply is missing."""
    facts = VideoFacts("video", scenario["video"]["frames"] / scenario["video"]["fps"])
    left = {agent: list(texts) for agent, texts in scenario["replies"].items()}
    steps = backtrack(Asked("q", "video", scenario["question"]), facts, Settings(), Replies(str))
    done, made = [], None
    while True:
        try:
            wanted = steps.send(made)
        except StopIteration as ended:
            return done, dataclasses.asdict(ended.value)
        if isinstance(wanted[0], CaptionCall):
            done.append(wanted)
            made = [Reply(caption_of(scenario, call)) for call in wanted]
        else:
            (call,) = wanted
            done.append((call.agent, call.prompt))
            if not left.get(call.agent):
                return done, None
            made = [Reply(left[call.agent].pop(0))]


def check_captions(wanted: list[CaptionCall], clips: list[dict], fps: float) -> None:
    assert [numbers(call.times, fps) for call in wanted] == [clip["frames"] for clip in clips]
    assert [len(call.times) for call in wanted] == [clip["num_frames"] for clip in clips]
    assert [call.max_pixels for call in wanted] == [clip["max_pixels"] for clip in clips]
    assert [call.instruction for call in wanted] == [full_instruction(clip) for clip in clips]


def test_golden_memory_and_next_call(golden):
    """What a prompt shows and what is asked next are the original's up to where it has a fault that ours has not."""
    num_whole = 0
    for scenario in scenarios(golden):
        upto, why = first_difference(scenario)
        fps, name = scenario["video"]["fps"], scenario["name"]
        ours, outcome = replay(scenario)
        # The original's summary is only printed: ours is not made. Its two lists of fine clips are one of ours.
        theirs = [event for event in scenario["events"] if event["agent"] != "summary"]
        place = number = 0
        for is_caption, group in itertools.groupby(theirs, key=lambda event: event["agent"] == "caption"):
            group = list(group)
            if is_caption and (number < upto or why.startswith("captions") or not why):
                clips = [clip for event in group for clip in event["clips"]]
                check_captions(ours[place], clips, fps)
                place += 1
                continue
            for event in [] if is_caption else group:
                number += 1
                if number > upto:
                    break
                agent, prompt = ours[place]
                place += 1
                assert agent == event["agent"], (name, number)
                assert shown(prompt) == event["memory"], (name, number)
                assert sorted(excluded(prompt)) == sorted(map(list, event["excluded"])), (name, number)
                assert f"A video of {scenario['video']['frames'] / fps:.1f} seconds" in prompt
        if not why:
            num_whole += 1
            assert outcome["answer"] == scenario["result"], name
            calls = scenario["calls"]
            assert outcome["captions"] == calls["caption"], name
            assert outcome["writer_calls"] == sum(calls.values()) - calls["caption"] - calls.get("summary", 0), name
            assert place == len(ours)
        else:
            assert outcome is None or outcome["phase"] in PHASES
    assert num_whole >= 1


def test_golden_nothing_that_was_described_is_lost(golden):
    """Every caption of the last look at a period is in the next prompt that sees all levels, whatever its place."""
    for scenario in scenarios(golden):
        ours, _ = replay(scenario)
        for before, after in itertools.pairwise(ours):
            if isinstance(before, list) and not isinstance(after, list):
                rows = [text for *_, text in shown(after[1])]
                for call in before:
                    assert caption_of(scenario, call) in rows, scenario["name"]


# ---- the loop --------------------------------------------------------------------------------------------------

EVENTS = [
    (0, 600, 1e9, "a harbour"),
    (134, 139, 10, "a red key"),
    (136, 137, 1, "the number seven"),
    (20, 50, 60, "a ferry"),
]
KEY = Asked("key", "harbour", "What is dropped in the harbour?", ("a blue hat", "a red key", "a green bag"))
FERRY = Asked("ferry", "harbour", "What arrives?", ("a plane", "a ferry"))
NOTHING = Asked("nothing", "harbour", "What is eaten?", ("a pear", "a plum"))
HARBOUR = VideoFacts("harbour", 300.0)
BUDGET = Settings(rounds=3, captions=40, writer_calls=12)


def outcomes(asked, settings=BUDGET, reply=by_keywords, facts=HARBOUR, strategy=backtrack, path=None, **options):
    """{id: outcome}, and the models that were called."""
    world, writer = World(EVENTS), Replies(reply)
    calls = Calls(path, world, writer, **options)
    done = {
        outcome.id: dataclasses.asdict(outcome) | {"seconds": 0}
        for outcome in run((strategy(one, facts, settings, writer) for one in asked), calls)
    }
    return done, world, writer


def test_finds_what_the_coarse_captions_miss():
    done, world, writer = outcomes([KEY, FERRY, NOTHING])
    assert (done["key"]["option"], done["key"]["phase"], done["key"]["confident"]) == ("B", "rounds", True)
    assert any(start <= 134 and end >= 139 for start, end in done["key"]["periods"])
    assert (done["ferry"]["option"], done["ferry"]["phase"], done["ferry"]["rounds"]) == ("B", "coarse", 0)
    assert done["nothing"]["phase"] == "forced" and not done["nothing"]["confident"]
    assert done["nothing"]["rounds"] == 3
    # What the outcomes say they cost is what the models did, but for the coarse captions, which all three share.
    assert sum(one["captions"] for one in done.values()) == world.made + 2 * 5 + shared_looks(done)
    assert sum(one["writer_calls"] for one in done.values()) == len(writer.prompts)


def shared_looks(done) -> int:
    """Fine captions that a second question asked for with the same instruction."""
    looks = [
        (event["period"], event["instruction"], len(event["clips"]))
        for one in done.values()
        for event in one["trace"]
        if event["kind"] == "captions" and event["instruction"]
    ]
    return sum(number for *_, number in looks) - sum(number for *_, number in set(looks))


def test_flat_asks_once():
    done, world, writer = outcomes([KEY, FERRY], strategy=flat)
    assert [done[id]["phase"] for id in ("key", "ferry")] == ["flat", "flat"]
    assert (done["key"]["option"], done["ferry"]["option"]) == ("A", "B")  # a guess, and what is described
    assert (world.made, len(writer.prompts)) == (5, 2)


def test_outcome_is_independent_of_batches():
    expected, *_ = outcomes([KEY, FERRY, NOTHING])
    for batch_size, together in ((1, 1), (3, 2), (64, 3)):
        world, writer = World(EVENTS), Replies(by_keywords)
        calls = Calls(None, world, writer, batch_size=batch_size)
        questions = (backtrack(one, HARBOUR, BUDGET, writer) for one in (NOTHING, FERRY, KEY))
        done = {one.id: dataclasses.asdict(one) | {"seconds": 0} for one in run(questions, calls, together)}
        assert done == expected


class KilledError(Exception):
    pass


def test_killed_after_any_call_and_resumed(tmp_path):
    batch_size = 2
    expected, world, writer = outcomes([KEY, NOTHING], batch_size=batch_size)
    num_calls = world.made + len(writer.prompts)
    for kill_at in range(0, num_calls, batch_size):
        path, left = tmp_path / f"{kill_at}.jsonl", [kill_at]

        def spend(number, left=left):
            left[0] -= number
            if left[0] < 0:
                raise KilledError

        class MortalWorld(World):
            def describe(self, calls, spend=spend):
                spend(len(calls))
                return super().describe(calls)

        class MortalReplies(Replies):
            def write(self, prompts, spend=spend):
                spend(len(prompts))
                return super().write(prompts)

        world, writer = MortalWorld(EVENTS), MortalReplies(by_keywords)
        calls = Calls(path, world, writer, batch_size=batch_size)
        with pytest.raises(KilledError):
            list(run((backtrack(one, HARBOUR, BUDGET, writer) for one in (KEY, NOTHING)), calls))
        made = world.made + len(writer.prompts)
        done, world, writer = outcomes([KEY, NOTHING], path=path, batch_size=batch_size)
        assert done == expected
        assert made + world.made + len(writer.prompts) == num_calls  # no call was made twice
        replayed = Calls(path, None, None, captioner_identity=World.identity, writer_identity="scripted")
        questions = (backtrack(one, HARBOUR, BUDGET, Replies(str)) for one in (KEY, NOTHING))
        assert {one.id: dataclasses.asdict(one) | {"seconds": 0} for one in run(questions, replayed)} == expected


def test_budgets_are_never_exceeded():
    for captions, writer_calls, writer_tokens in itertools.product((1, 3, 5, 12, 30), (1, 2, 3, 6), (1, 400, 1500)):
        settings = Settings(captions=captions, writer_calls=writer_calls, writer_tokens=writer_tokens)
        done, *_ = outcomes([NOTHING, KEY], settings)
        for one in done.values():
            assert one["captions"] <= captions and one["writer_calls"] <= writer_calls
            assert one["writer_tokens"] <= writer_tokens
            assert one["phase"] in ("budget", "failed", "rounds")
            if one["phase"] == "budget":
                assert one["answer"] and one["notes"]
            if one["phase"] == "failed":
                assert one["answer"] is None and one["option"] is None and writer_tokens == 1


@pytest.mark.parametrize("field", ["captions", "writer_calls", "writer_tokens"])
def test_budget_of_zero(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        Settings(**{field: 0})


def test_settings_that_make_no_sense():
    for wrong in ({"windows": (10, 60, 1)}, {"fps": (1, 0, 2)}, {"rounds": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)
    assert Settings(rounds=0).rounds == 0
    done, *_ = outcomes([NOTHING], Settings(rounds=0))
    assert done["nothing"]["phase"] == "forced" and not done["nothing"]["periods"]


def test_writer_that_is_down():
    done, world, _ = outcomes([KEY], reply=lambda prompt: Reply(None, "the server is down"))
    one = done["key"]
    assert (one["phase"], one["answer"], one["option"]) == ("failed", None, None)
    assert set(one["failures"]) == {"the server is down"}
    assert one["rounds"] == 3 and len(set(one["periods"])) == 3  # windows by rule
    assert world.made == one["captions"]


def test_writer_that_goes_down_keeps_its_last_guess():
    def reply(prompt):
        if agent_of(prompt) == "answer":
            return '{"Confidence": "False", "Answer": "C", "Reason": "true, none is seen"}'
        return Reply(None, "no reply within 5 s")

    (one,) = outcomes([KEY], reply=reply)[0].values()
    assert (one["phase"], one["option"], one["confident"]) == ("forced", "C", False)
    assert any("not sure" in note for note in one["notes"]) and one["failures"]


def test_failed_calls_are_made_again(tmp_path):
    outcomes([FERRY], path=tmp_path / "calls.jsonl", reply=lambda prompt: Reply(None, "down"))
    done, world, writer = outcomes([FERRY], path=tmp_path / "calls.jsonl")
    assert done["ferry"]["option"] == "B" and world.made == 0 and len(writer.prompts) == 1


def test_writer_out_of_form():
    """It is asked once more with the fault named; then the loop goes on by rule, and the raw text is the last word."""
    for text, option in (("It must be the red key!", "B"), ("I cannot say.", "A")):
        done, _, writer = outcomes([KEY], Settings(rounds=3), reply=lambda prompt, text=text: text)
        one = done["key"]
        assert (one["phase"], one["option"], one["confident"]) == ("forced", option, False)
        again = [prompt for prompt in writer.prompts if "could not be used: it held no dictionary" in prompt]
        assert 2 * len(again) == len(writer.prompts)
        assert len(one["periods"]) == len(set(one["periods"])) == 3
    assert any("named no option" in note for note in one["notes"])


def test_a_last_reply_out_of_form_stands_where_no_budget_is_left_to_ask_again():
    for tokens in range(400, 1300, 50):
        settings = Settings(writer_tokens=tokens)
        one = outcomes([KEY], settings, reply=lambda prompt: "I say **B**, the red key.")[0]["key"]
        assert (one["phase"], one["option"], one["confident"]) == ("budget", "B", False)
        assert one["writer_tokens"] <= tokens and not any("could be asked" in note for note in one["notes"])


def test_captions_fail():
    world = World(EVENTS)
    world.describe = lambda calls: [Reply(None, "no such file") for _ in calls]
    writer = Replies(by_keywords)
    (one,) = run([backtrack(KEY, HARBOUR, BUDGET, writer)], Calls(None, world, writer))
    assert one.phase == "forced" and one.failures[0] == "no such file" and not one.confident


def test_captions_longer_than_the_context():
    class LongWorld(World):
        def caption(self, call):
            return super().caption(call) + ". " + "It goes on and on. " * 200

    world, writer = LongWorld(EVENTS), Replies(by_keywords)
    writer.context = 900
    sent = []
    original = writer.write
    writer.write = lambda prompts: sent.extend(prompts) or original(prompts)
    (one,) = run([backtrack(KEY, HARBOUR, BUDGET, writer)], Calls(None, world, writer))
    assert max(map(writer.count, sent)) + writer.max_new_tokens <= writer.context
    assert all(len(shown(prompt)) >= 5 for prompt in sent)  # no window's line is dropped
    assert one.option == "B" and any("were cut to" in note for note in one.notes)
    writer.context = 150  # not even the question
    (one,) = run([backtrack(KEY, HARBOUR, BUDGET, writer)], Calls(None, world, writer))
    assert one.phase == "failed" and any("without captions" in note for note in one.notes)


def test_a_repeated_period_and_one_outside():
    """A new instruction is worth a second look, the same one is not; times outside the video are none."""

    def reply(prompt):
        if agent_of(prompt) == "localize":
            return '{"Time Period": [[240, 180]], "Instruction": "again"}'
        return FORGOTTEN if agent_of(prompt) == "answer" else by_keywords(prompt)

    one = outcomes([KEY], reply=reply)[0]["key"]
    assert one["periods"][0] == (180.0, 240.0) and len(set(one["periods"])) == 3
    far = outcomes([KEY], reply=lambda prompt: reply(prompt).replace("[240, 180]", "[900, 990]"))[0]["key"]
    assert all(0 <= start < end <= 300 for start, end in far["periods"]) and len(set(far["periods"])) == 3


def test_levels_follow_from_the_length():
    for period, level, length in (((20, 29), "ultra-fine", 1), ((20, 32), "fine", 10), ((25, 25), "ultra-fine", 1)):

        def reply(prompt, period=period):
            if agent_of(prompt) == "localize":
                return json.dumps({"Time Period": [period], "Instruction": "look"})
            return FORGOTTEN if agent_of(prompt) == "answer" else by_keywords(prompt)

        one = outcomes([KEY], Settings(rounds=1), reply=reply)[0]["key"]
        (look,) = [event for event in one["trace"] if event["kind"] == "captions" and event["instruction"]]
        parts = [clip["period"] for clip in look["clips"] if clip["split"] == "part"]
        assert look["level"] == level and parts[0][1] - parts[0][0] == length


def test_type_question_leaves_out_windows_until_the_end():
    def reply(prompt):
        if agent_of(prompt) == "type":
            return '{"flag": "yes", "time period": "(125, 140) and (130, 131)"}'
        return FORGOTTEN if agent_of(prompt) == "answer" else by_keywords(prompt)

    done, _, writer = outcomes([KEY], Settings(rounds=1), reply=reply)
    windows = {agent_of(prompt): [row[1] for row in shown(prompt) if row[0] == "period"] for prompt in writer.prompts}
    assert windows["localize"] == [60, 120, 180] and windows["force"] == [0, 60, 120, 180, 240]


def test_frames_that_are_not_stored():
    one = outcomes([KEY], facts=VideoFacts("harbour", 300.0, fps=1.0))[0]["key"]
    assert one["option"] == "B" and any("at 1" in note for note in one["notes"])


def test_replies_of_any_form():
    """500 odd texts: no exception, no question without an end, no period outside the video."""
    rng = random.Random(0)
    pieces = [
        *("{", "}", "[", "]", "(", ")", '"', "'", ",", ":", "\n", "```json", "</think>", "true", "False", "null", "\\"),
        *('"Confidence"', '"Answer"', '"Time Period"', '"Flag"', '"Instruction"', "B", "12", "-3", "1e999", "[(5, 9)]"),
        *("\ud800", "ü", "\x00", "{'a': {'b': 1}}", '{"Confidence": "yes", "Answer": "B",}', "(130.0, 140.0)", "nan"),
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(25))) for _ in range(500)]
    video = VideoFacts("harbour", 125.0)
    asked = [dataclasses.replace(KEY, id=str(i)) for i in range(len(texts))]
    world, writer = World(EVENTS), Replies(lambda prompt: texts[int(re.search(r"#(\d+)#", prompt)[1])])
    questions = [dataclasses.replace(one, text=f"#{one.id}# What?") for one in asked]
    settings = Settings(rounds=1)
    done = list(run((backtrack(one, video, settings, writer) for one in questions), Calls(None, world, writer)))
    assert len(done) == 500 and {one.phase for one in done} <= set(PHASES)
    for one in done:
        assert all(0 <= start < end <= 125 for start, end in one.periods)
        json.dumps(vars(one))
    assert len({one.phase for one in done}) >= 2


def test_a_video_of_no_length():
    with pytest.raises(ValueError, match="harbour: its duration is 0"):
        outcomes([KEY], facts=VideoFacts("harbour", 0.0))


def test_short_videos_have_a_window():
    for duration in (0.4, 1.0, 7.0, 61.0):
        one = outcomes([KEY], facts=VideoFacts("harbour", duration))[0]["key"]
        assert one["captions"] >= 1 and all(end <= duration for _, end in one["periods"])
        assert isinstance(one["trace"][0]["clips"][0]["caption"], str)


def test_a_writer_call_says_its_agent():
    steps = backtrack(KEY, HARBOUR, BUDGET, Replies(by_keywords))
    captions = next(steps)
    (call,) = steps.send([Reply("a harbour")] * len(captions))
    assert isinstance(call, WriterCall) and call.agent == "coarse_answer"
