import pytest
from toy_bank import conversation_tokenizer, sentence_tokenizer
from transformers import CLIPTokenizer, Qwen2Tokenizer

from tspo_jax.checkpoints import folders as checkpoints
from tspo_jax.toy.frame_bank import BALL_NAMES, SETTING_NAMES, THING_NAMES
from tspo_jax.toy.tokenizers import MAX_VOCABULARY

WORDS = THING_NAMES + BALL_NAMES + SETTING_NAMES
UNSEEN = "Größe ☃ (zebra) été\t42\n\n'Q' 日本"


@pytest.fixture(scope="module")
def clip():
    return sentence_tokenizer()


@pytest.fixture(scope="module")
def qwen2():
    return conversation_tokenizer()


def test_words_of_the_world_are_single_tokens(clip, qwen2):
    for word in WORDS:
        assert len(qwen2(f" {word}")["input_ids"]) == 1, word
        assert len(clip(word)["input_ids"]) == 3, word
    assert len({qwen2(f" {word}")["input_ids"][0] for word in WORDS}) == len(WORDS)
    for letter in "ABCD":
        assert len(qwen2(letter)["input_ids"]) == 1
    question = "What colour is the ball shown with the tree?"
    assert len(qwen2(question)["input_ids"]) == len(clip(question)["input_ids"]) - 2 == 10
    assert max(len(clip), len(qwen2)) < MAX_VOCABULARY


def test_any_text_can_be_said(clip, qwen2):
    assert qwen2.decode(qwen2(UNSEEN)["input_ids"]) == UNSEEN
    every_character = "".join(map(chr, range(32, 0x250)))
    assert qwen2.decode(qwen2(every_character)["input_ids"]) == qwen2.backend_tokenizer.normalizer.normalize_str(
        every_character
    )
    assert clip.unk_token_id not in clip("größe ☃ 日本")["input_ids"][1:-1]
    assert clip.decode(clip("größe ☃ 日本")["input_ids"], skip_special_tokens=True) == "größe ☃ 日本"


def test_special_tokens(clip, qwen2):
    start, end = len(clip) - 2, len(clip) - 1
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (start, end, end)
    ids = clip("A TREE in the desert")["input_ids"]
    assert ids == clip("a tree  in the desert")["input_ids"]  # case and spaces do not count
    assert ids[0] == start and ids[-1] == end and max(ids[1:-1]) < start
    assert clip.model_max_length == 77

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special_ids = qwen2.convert_tokens_to_ids(specials)
    assert sorted(special_ids) == list(range(len(qwen2) - 3, len(qwen2)))
    assert (qwen2.pad_token_id, qwen2.eos_token_id) == (special_ids[0], special_ids[2])
    assert qwen2("".join(specials))["input_ids"] == special_ids
    ids = qwen2("<|im_start|>user\nred<|im_end|>")["input_ids"]
    assert ids[0] == special_ids[1] and ids[-1] == special_ids[2]
    assert qwen2.decode(ids, skip_special_tokens=True) == "user\nred"


def test_saved_tokenizers_give_the_same_ids(clip, qwen2, tmp_path):
    for kind, tokenizer in ((CLIPTokenizer, clip), (Qwen2Tokenizer, qwen2)):
        folder = tmp_path / kind.__name__
        tokenizer.save_pretrained(folder)
        loaded = checkpoints.read_tokenizer(kind, folder, len(tokenizer))
        for text in (UNSEEN, "What is shown right after the umbrella?", "<|im_start|>user\nA. red<|im_end|>", *WORDS):
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert loaded.model_max_length == tokenizer.model_max_length
